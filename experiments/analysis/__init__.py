"""From scores to verdicts: repeated assignments, intervals, multiplicity, power.

In the order that data flow, with what others may use of each module:

1. `scores`: the probes that measured the final weights (`read_probes`);
2. `measured`: an experiment's units, arms, exposures and scores side by side (`Measured`,
   `measure`);
3. `estimates`: one comparison's effect, interval and p-value (`estimate`), from repetitions of
   the assignment (`randomization`) or before training (`power`);
4. `answers`: every outcome and curve of an experiment (`curves`), not yet corrected;
5. `verdict`: the sentence about a corrected primary outcome.

`analyze` runs 3 to 5 over all experiments of a run and corrects for asking many questions.
"""
