"""Score any model under missing modalities, report it, and compare it with others."""

from mmfusion.evaluation.compare import Comparison, Ranked, compare
from mmfusion.evaluation.contributions import contributions
from mmfusion.evaluation.diagnostics import diagnose
from mmfusion.evaluation.page import write_page
from mmfusion.evaluation.report import Condition, Estimate, MissingnessReport, Scores
from mmfusion.evaluation.run import evaluate, merge
from mmfusion.evaluation.scores import score

__all__ = [
    "Comparison",
    "Condition",
    "Estimate",
    "MissingnessReport",
    "Ranked",
    "Scores",
    "compare",
    "contributions",
    "diagnose",
    "evaluate",
    "merge",
    "score",
    "write_page",
]
