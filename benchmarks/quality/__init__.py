"""Which order of freezing keeps the quality? Eleven tasks, each continued from one state with every order."""
