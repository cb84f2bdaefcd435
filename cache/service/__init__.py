"""The service: a lake over HTTP. Reads, computes what is missing, and never answers whom it does not know. No torch.

Who may be hostile, and what then holds:

A client without a key gets 401 from every route but /healthz, in the same time whatever keys there are. It can hold
connections (a head must be there after 30 s) and make the process hash keys; how many connections there may be is for the
proxy in front. A web page in a user's browser cannot use that user's key: no CORS, no writing request from another site, and
a server of one machine answers to that machine's names alone.

A client with a key is bounded in bytes, samples, tokens, time and requests at once, and in what others wait for. It sees its
own tenant's captures and those of nobody; another's are as if they were not there. Names that it sends are looked up among
what is there, never joined to a path. It sends descriptions, never code, and gets numbers: nothing is unpickled on either
side, and the server fetches nothing that a client names. Clients of scope `admin` may remove captures.

A dataset, or whoever wrote prompts and answers, decides texts, and texts only: they are in no log, metric or error, and the
page shows them as text.

What lies in the lake (captures, grids, probes, labels) may be damaged or made up: sizes are checked before memory is taken,
every byte of an activation against the checksum that was committed with it, and only committed files are served; symbolic
links inside a capture are not followed. A checksum is no signature: whoever can write into the lake can replace a capture by
another valid one, or put a link to a capture beside the others. What is served as raw Zarr is checked by its reader.

A model's repository is read by workers, and by the process that makes token ids, never by this one, and without
`trust_remote_code`.

What does not hold: there is no TLS here (put a proxy in front that has it, beyond one machine); whoever reads the disk reads
everything; and activations can be turned back into the text that they are of, so that a key that reads them reads prompts.
"""
