"""The nouns that every stage speaks: scalar language, index expressions, fused ops, graph helpers, cost."""
