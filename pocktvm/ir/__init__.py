"""The nouns of the compiler: frozen dataclasses, which import no other room."""
