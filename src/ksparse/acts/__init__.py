"""Text -> tokens -> activations -> shuffled batches.

text    documents[str]            -> contexts: tokens[b, t], what is padding, what is kept, whose
        document
lm      contexts                  -> x[b, t, d] at one site of a causal LM; and the LM run with x
        replaced
sites   names of places           -> what is read and changed there, confirmed on the loaded LM
agreement   an LM at its site     -> passes that must agree, compared once
provenance  an SAE and an LM      -> whether it is asked about what it was trained on
order   a seed                    -> permutations that need no memory
stream  contexts + lm | shards    -> Batch: x[batch, d], raw, mixed; a cursor to go on from
shards  activations on disk, with sums
"""
