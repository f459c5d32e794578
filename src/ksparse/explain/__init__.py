"""Explanations of latents in words, by a language model behind an OpenAI-compatible server.

Paulo et al. 2024, "Automatically Interpreting Millions of Features in Large Language Models".

    options    what to explain, and the server to ask
    examples   windows of held-out text in which a latent fires, or does not
    texts      these windows on disk
    prompts    what the server is asked, and how its answers are read
    server     HTTP requests, retries, the limit of requests a minute
    answers    the answers on disk, by request
    explain    the order of the questions, the scores and their baselines
"""
