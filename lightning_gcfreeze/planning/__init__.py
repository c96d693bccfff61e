"""When to freeze, and how much: as given, or found from the data."""
