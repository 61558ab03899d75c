"""`GET /`: the daemon's status as one HTML page, for a browser that reaches the socket.

`view` chooses what of the status is shown, by the address; `prompt` tells of one prompt; `page`
renders the template, which escapes every value. The page's script asks for the page again when
something changed, and takes over the parts that differ. So all words are made in one place, the
page works without its script as far as it can, and there is nothing else to load.
"""
