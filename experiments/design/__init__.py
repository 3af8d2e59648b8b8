"""From a YAML entry to a frozen study: definition, units, blocks, arms, exposures asked for.

In order: `parser` gives a `spec`; an `experiment` makes units (`units`, `clusters`); `assignment`
gives them arms; `requests` lists exposures; `study` compiles all; `lock` and `frozen` keep them.
"""
