"""IFEval's checks, which are the harness's; they need the extra ``lm-eval[ifeval]``."""

from lm_eval.tasks.ifeval.utils import agg_inst_level_acc, process_results

__all__ = ["agg_inst_level_acc", "process_results"]
