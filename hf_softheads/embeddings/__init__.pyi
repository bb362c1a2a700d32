# Written by `make docs`.
from hf_softheads.embeddings.head_rows import HeadRows as HeadRows
