"""One folder a paper, plus the models and the trainer they share; not part of the installed package."""
