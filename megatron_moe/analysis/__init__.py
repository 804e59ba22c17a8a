"""Routing and weights of MoE models of other programs, read only.

`open_foreign` gives routers and experts one tensor at a time, `load_foreign` the routing decisions
for given tokens. See docs/conversion.md.
"""
