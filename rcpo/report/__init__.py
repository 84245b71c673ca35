"""`rcpo report`: what happened in a run, a pair or a sweep, from their folders alone, without torch.

`runs` reads folders, `series` and `dynamics` and `probes` make numbers of them, `panels` and `figures` draw,
`tables` and `words` say it, `document` puts both into sections, `render` makes HTML and Markdown of them.
"""
