"""A family of the tests' own: members that run the first layers of the whole model.

`SOURCE` is the file as a user would write it next to run.yaml.
"""

from __future__ import annotations

SOURCE = '''
from dataclasses import replace

from motet.models.family.base import Family, Member, TrainingStage


class FirstLayers(Family):
    """Members `first-N`, N of `options.layers`; shares take them and the whole in turn."""

    def members(self):
        return [
            Member(f"first-{n}", replace(self.whole, n_layers=n), tuple(range(n)))
            for n in self.options["layers"]
        ]

    def choose(self, step, draws):
        names = [None, *(f"first-{n}" for n in self.options["layers"])]
        kind = self.options.get("choose", "turns")
        if kind == "steps":  # one member a step
            return [(names[(step + self.seed) % len(names)],)] * draws
        if kind == "sandwich":  # all of them on each share
            return [tuple(names)] * draws
        return [(names[(step + draw) % len(names)],) for draw in range(draws)]

    def stage(self, step):
        if "stage_steps" not in self.options:
            return None
        steps = self.options["stage_steps"]
        return TrainingStage(step // steps * steps, steps, lr_scale=0.5, warmup_steps=2)
'''
space: dict[str, object] = {}
exec(SOURCE, space)
FirstLayers = space["FirstLayers"]
