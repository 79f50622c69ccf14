"""Pi0 and Pi0.5: the model, its transforms, tokenizer and checkpoints."""
