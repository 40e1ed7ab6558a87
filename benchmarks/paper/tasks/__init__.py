"""Tasks for lm-evaluation-harness that it lacks, or that it cannot do without the Hub's scripts."""
