"""What a sample is: transforms of the same tokens, chosen by `--objective`.

`select` picks one. `prefix_lm` hides the loss of a prefix; `ul2` denoises (`mixture` says how,
`spans` does it, `windows` cuts the text); `sft` trains on conversations (`chat`, `chat_source`).
All randomness comes from `noise`, as a function of seed and sample.
"""
