"""The paper's five data sets and models, and commands that train them with the callback."""
