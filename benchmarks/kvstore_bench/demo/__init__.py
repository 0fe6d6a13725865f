"""`kvstore demo`: one worker prefills a document, another reuses its KV over a slow link."""
