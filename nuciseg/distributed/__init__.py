"""Everything that knows Ray. Whatever process of Ray's begins with it imports much more."""

from nuciseg.startup import imports_begin

imports_begin()
