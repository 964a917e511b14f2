"""The names that settings choose among. tests/test_config.py holds them to what the rooms above can do."""

PROCESSES = ("hierarchical", "gidd", "sedd", "autoregressive")
FORCE_TRANSITIONS = ("none", "within", "between", "cavity")
CLUSTERS = ("exact", "clean")
WEIGHTINGS = {"hierarchical": ("none", "constant", "clip", "empirical"),  # training losses, by process
              "sedd": ("none", "constant", "clip", "empirical"),
              "gidd": ("none", "constant", "clip", "dynamic"),
              "autoregressive": ("constant",)}
DETOKENIZERS = ("", "lm1b", "ptb", "wikitext", "lambada", "ag_news")
TASKS = ("ptb", "wikitext2", "lambada", "ag_news", "openwebtext", "lm1b", "files", "hellaswag", "arc_easy",
         "arc_challenge", "piqa", "openbookqa", "winogrande", "lambada_last_word")
TXT_DOCUMENTS = ("file", "blank_line", "line")
FORMATS = ("auto", "txt", "jsonl", "json", "parquet", "tar")

PACKINGS = ("concat", "documents", "crop")
PADDINGS = ("end", "hidden")

PROTOCOLS = ("document", "packed")
