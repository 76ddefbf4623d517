"""``qlora serve``: an OpenAI-compatible server and a chat page over a model in 4 bits.

``guard`` (who may ask, and how much), ``protocol`` (what a request may say, and the shapes of
answers), ``adapters`` (several of them on one base, mixed in a batch), ``sampling`` (draws with a
seed of their own), ``engine`` (transformers' continuous batching), ``text`` (tokens to characters),
``app`` (the routes), ``command`` (the command line), ``load`` (a client that measures).
"""
