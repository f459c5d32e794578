"""The sparse autoencoder itself: no process group, no logging, no language model.

| module | provides |
|---|---|
| model | `SAE`, `Shape`: the autoencoder as a plain nn.Module |
| activations | TopK, BatchTopK, ReLU, JumpReLU, gated, ProLU: one module each |
| code | `Code`: the active latents of each token, and their values |
| normalization | raw activations to the SAE's inputs, and reconstructions back |
| init | start values of the weights |
| losses, terms | the training loss as named terms |
| sharded | `ShardedSAE`: an SAE that several processes share |
| joint | what they compute together: nothing, for an SAE of one process |
| serialization | saving and loading an SAE's folder |
| tensor_files | tensors of safetensors files, checked before they are used |
| ranges | the range of each latent's values |
"""
