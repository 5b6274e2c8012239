"""profile(): what holds a training loop back, and what to do about it.

    with vitkern.profile(out="runs/profile") as p:
        for images, labels in loader:
            ...
            p.step(images=len(images))

``torch.profiler`` records; everything that is reported comes from its trace, so a saved one gives
the same report: ``python -m vitkern profile --trace FILE``.
"""

from vitkern.profile.session import profile

__all__ = ["profile"]
