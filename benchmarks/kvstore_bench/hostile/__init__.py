"""Gives every parser of bytes that a stranger may write hostile input whose checksums are right, and judges what it
does: refuse it with the error that it documents, or read it. A crash, a hang, any other exception, or more than twice
the memory of honest input is a fault."""
