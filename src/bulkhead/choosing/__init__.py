"""Which boundary a workload needs: facts, rules that can be read, advice, and portfolios."""
