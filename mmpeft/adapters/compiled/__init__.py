"""`mmpeft.compile(model)`: one call that turns on the fast paths that fit a model, and says what it did and what not.

    compiled = mmpeft.compile(model)          # prints a line for every part: what runs how, or why it stays as it was
    step = compiled.train_step(batch=8, length=1024, lr=1e-4);  loss = step(ids, labels)
    compiled.undo()                           # or: with mmpeft.compile(model): ...
"""

from mmpeft.adapters.compiled.model import Compiled, compile

__all__ = ["Compiled", "compile"]
