"""Text -> tokens -> activations -> shuffled batches.

text    documents[str]            -> contexts: tokens[b, t], what is padding, what is kept, whose
        document
lm      contexts                  -> x[b, t, d] at one site of a causal LM; and the LM run with x
        replaced
order   a seed                    -> permutations that need no memory
stream  contexts + lm | shards    -> Batch: x[batch, d], raw, mixed; a cursor to go on from
shards  activations on disk, with sums
"""
