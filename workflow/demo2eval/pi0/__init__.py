"""Pi0 and Pi0.5: the model, its transforms and its tokenizer."""
