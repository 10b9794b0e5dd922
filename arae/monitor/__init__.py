"""How a run stands, from outside its training: what its log tells, in figures, in words, on a terminal."""
