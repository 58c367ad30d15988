"""How well a model predicts text: teachers and students on the same tokens."""
