"""Audits of the engines: what they compute, held to a profile, named rule by rule, and explained where two differ."""
