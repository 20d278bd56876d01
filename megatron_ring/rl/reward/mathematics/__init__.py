"""Mathematics and science: a grammar of answers, and exact or high-precision comparison of values."""
