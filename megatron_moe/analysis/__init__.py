"""What is known of a mixture's routing and weights: other programs' models, read only.

`open_foreign` gives their routers and experts one tensor at a time, `load_foreign` what they choose
for given tokens. See docs/conversion.md.
"""
