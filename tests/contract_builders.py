"""The list behind the contract: one row per public layer, model and op.

A new class is not merged before its row stands in one of the four files; every check of
``test_contract*.py`` then runs over it.
"""

import contract_baselines
import contract_layers
import contract_models
import contract_ops

CASES = [
    *contract_layers.CASES,
    *contract_models.CASES,
    *contract_baselines.CASES,
    *contract_ops.CASES,
]
BY_NAME = {case.name: case for case in CASES}
