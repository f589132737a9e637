"""Records in, explanations and scores out: everything here runs without torch.

`pipeline` is the exception by intent: it brings the model, the harvest and this package together, and
imports them when it is run.
"""
