"""The pages of docs that hold figures, made from results and hand-written templates."""
