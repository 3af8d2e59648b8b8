"""Time and memory of a layout on a cluster, without torch: what a step takes, what every rank
holds, how far to trust both.

For others: `stages.predict` (the front door) and `stage_costs`; `terms` (`Training`, `Traits`,
`Prediction`); `predictor.Predictor` (asked many times); `timeline` (a pipeline pass by pass);
`fit` (constants from runs); `family` (what a family of models costs).
"""
