"""Numbers that options and the mathematics begin with alike; options must not import the mathematics."""

TAU = 1e-3  # ridge, over the mean of C_pre's diagonal
LAMBDA = 1.0  # gamma at which a step is halved
S_MIN = 0.3  # floor of the gate
