/* A loader for a libc that has none (static programs on musl, Hexagon's among them). */
#ifndef POCKTVM_ELF_LOADER_H
#define POCKTVM_ELF_LOADER_H

typedef struct elf_library elf_library;

/* Maps a shared library and binds it to this program's libc; NULL: elf_error says why. */
elf_library *elf_open(const char *path);

/* Address of an exported symbol, or NULL. */
void *elf_symbol(const elf_library *library, const char *name);

const char *elf_error(void);

/* elf_imports.c: what a library may take from this program; NULL: nothing of that name. */
void *elf_import(const char *name);

/* elf_imports.c: tells the library's own dladdr and dl_iterate_phdr where it lies. */
void elf_describe(const char *path, const char *base, const void *phdr, int n_phdr);

#endif
