"""Recipes: fine-tune a pre-trained model, look at what froze, ship what changed, and compare with other methods."""
