"""Files that are complete or absent, and that reveal damage. Nothing here imports torch.

atomic       folders and files that replace older ones in one step; locks; links out of a folder
jsonio       JSON that is checked when it is read
checksums    folders with a manifest of SHA-256 checksums
rows         documents and rows of files that others wrote: .txt, .jsonl, .csv, .parquet
run_folder   where the files of a run are
"""
