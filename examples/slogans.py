"""An experiment class of one's own, as in docs/experiments.md; `use: slogans.py:Slogans` in
run.yaml.
"""

from motet import Experiment, ItemTable, OutcomeSpec, ProbeItem, Unit, per_token


class Slogans(Experiment):
    description = "are slogans learned from repetition"
    protocol = "Each unit is a slogan, shown 0 or more times; its last words are scored."
    fields = {"start": (str,), "end": (str,)}  # required fields of a row, beside id
    defaults = {"generate": {"count": 12, "seed": 0}, "doses": [0, 8]}
    outcomes = (
        OutcomeSpec(
            "logprob",
            "log-probability of the ending",
            "nats/token",
            "better known",
            primary=True,
            secondary=False,
        ),
    )

    def unit_of(self, row):
        item = ProbeItem("end", "end", row["start"], " " + row["end"])
        return Unit(row["id"], (row["start"] + " " + row["end"],), (item,))

    def generate_rows(self, count, seed):
        return [
            {"id": f"s{i}", "start": f"Slogan {seed} {i} is", "end": f"word{i}"}
            for i in range(count)
        ]

    def measure(self, units, scores):  # {outcome: one value per unit} at one probe step
        return {"logprob": ItemTable(units).mean(per_token(scores), "end")}
