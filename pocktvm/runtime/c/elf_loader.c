/* Maps a shared library's segments, applies its relocations, runs its constructors.
 *
 * It takes what our own linker makes: no libraries needed, no thread-local storage, no text
 * relocations. Anything else is refused with its name: never half bound. One library per process,
 * which stays until the process ends. */
#define _GNU_SOURCE
#include "elf_loader.h"

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__hexagon__)
enum { MACHINE = 164, ABSOLUTE = 6, GLOBAL_DATA = 33, JUMP_SLOT = 34, RELATIVE = 35 };
#elif defined(__aarch64__)
enum { MACHINE = EM_AARCH64, ABSOLUTE = 257, GLOBAL_DATA = 1025, JUMP_SLOT = 1026, RELATIVE = 1027 };
#elif defined(__x86_64__)
enum { MACHINE = EM_X86_64, ABSOLUTE = 1, GLOBAL_DATA = 6, JUMP_SLOT = 7, RELATIVE = 8 };
#else
#error "elf_loader.c knows no relocations of this machine"
#endif

#if UINTPTR_MAX > 0xffffffffu
#define RELOCATION_TYPE(info) ELF64_R_TYPE(info)
#define RELOCATION_SYMBOL(info) ELF64_R_SYM(info)
#else
#define RELOCATION_TYPE(info) ELF32_R_TYPE(info)
#define RELOCATION_SYMBOL(info) ELF32_R_SYM(info)
#endif

struct elf_library {
  char *base; /* of address 0 in the file */
  size_t page;
  int n_phdr;
  const ElfW(Phdr) *phdr;
  const ElfW(Sym) *symbols;
  const char *strings;
  const uint32_t *hash; /* buckets, chains, … */
};

static char message[512];

const char *elf_error(void) { return message; }

static int fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

static int fail(const char *format, ...) {
  va_list list;
  va_start(list, format);
  vsnprintf(message, sizeof message, format, list);
  va_end(list);
  return -1;
}

static uintptr_t page_down(const elf_library *l, uintptr_t at) { return at & ~(uintptr_t)(l->page - 1); }

static uintptr_t page_up(const elf_library *l, uintptr_t at) { return page_down(l, at + l->page - 1); }

/* --- segments --- */

static int read_headers(elf_library *l, int fd) {
  ElfW(Ehdr) head;
  if (pread(fd, &head, sizeof head, 0) != (ssize_t)sizeof head ||
      memcmp(head.e_ident, ELFMAG, SELFMAG) || head.e_type != ET_DYN)
    return fail("not a shared library");
  if (head.e_machine != MACHINE || head.e_phentsize != sizeof(ElfW(Phdr)) || head.e_phnum > 64)
    return fail("made for another machine (ELF machine %d)", (int)head.e_machine);
  ElfW(Phdr) *phdr = calloc(head.e_phnum, sizeof *phdr);
  if (!phdr) return fail("no memory");
  l->phdr = phdr;
  l->n_phdr = head.e_phnum;
  ssize_t nbytes = (ssize_t)(head.e_phnum * sizeof *phdr);
  return pread(fd, phdr, (size_t)nbytes, (off_t)head.e_phoff) == nbytes ? 0 : fail("truncated");
}

/* One range for all segments, so that their distances stay as linked. */
static int reserve(elf_library *l) {
  uintptr_t end = 0;
  for (int i = 0; i < l->n_phdr; i++) {
    if (l->phdr[i].p_type == PT_TLS) return fail("it uses thread-local storage");
    if (l->phdr[i].p_type != PT_LOAD) continue;
    uintptr_t last = page_up(l, (uintptr_t)(l->phdr[i].p_vaddr + l->phdr[i].p_memsz));
    end = last > end ? last : end;
  }
  if (!end) return fail("it has no segments");
  void *base = mmap(NULL, end, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) return fail("cannot map %zu bytes: %s", (size_t)end, strerror(errno));
  l->base = base;
  return 0;
}

/* File pages writable for now; what lies beyond the file's part is zero. */
static int map_segment(elf_library *l, const ElfW(Phdr) *segment, int fd) {
  uintptr_t start = page_down(l, (uintptr_t)segment->p_vaddr);
  uintptr_t in_file = (uintptr_t)(segment->p_vaddr + segment->p_filesz);
  uintptr_t end = page_up(l, (uintptr_t)(segment->p_vaddr + segment->p_memsz));
  uintptr_t shared = page_up(l, in_file);
  off_t offset = (off_t)(segment->p_offset - (segment->p_vaddr - start));
  int fixed = MAP_PRIVATE | MAP_FIXED, access = PROT_READ | PROT_WRITE;
  if (segment->p_filesz &&
      mmap(l->base + start, shared - start, access, fixed, fd, offset) == MAP_FAILED)
    return fail("cannot map a segment: %s", strerror(errno));
  if (!segment->p_filesz) shared = start;
  if (end > shared && mmap(l->base + shared, end - shared, access, fixed | MAP_ANONYMOUS, -1, 0) ==
                          MAP_FAILED)
    return fail("cannot map zeros: %s", strerror(errno));
  if (segment->p_filesz && (segment->p_flags & PF_W))
    memset(l->base + in_file, 0, shared - in_file);
  return 0;
}

static int protect(const elf_library *l) {
  for (int i = 0; i < l->n_phdr; i++) {
    const ElfW(Phdr) *segment = &l->phdr[i];
    if (segment->p_type != PT_LOAD) continue;
    int access = (segment->p_flags & PF_R ? PROT_READ : 0) |
                 (segment->p_flags & PF_W ? PROT_WRITE : 0) |
                 (segment->p_flags & PF_X ? PROT_EXEC : 0);
    uintptr_t start = page_down(l, (uintptr_t)segment->p_vaddr);
    uintptr_t end = page_up(l, (uintptr_t)(segment->p_vaddr + segment->p_memsz));
    if (mprotect(l->base + start, end - start, access))
      return fail("cannot make its code executable: %s", strerror(errno));
  }
  return 0;
}

/* --- symbols and relocations --- */

static const ElfW(Dyn) *find_dynamic(const elf_library *l, ElfW(Sxword) tag) {
  for (int i = 0; i < l->n_phdr; i++) {
    if (l->phdr[i].p_type != PT_DYNAMIC) continue;
    const ElfW(Dyn) *entry = (const void *)(l->base + l->phdr[i].p_vaddr);
    for (; entry->d_tag != DT_NULL; entry++)
      if (entry->d_tag == tag) return entry;
  }
  return NULL;
}

static const void *table(const elf_library *l, ElfW(Sxword) tag) {
  const ElfW(Dyn) *entry = find_dynamic(l, tag);
  return entry ? l->base + entry->d_un.d_ptr : NULL;
}

static size_t size_of(const elf_library *l, ElfW(Sxword) tag) {
  const ElfW(Dyn) *entry = find_dynamic(l, tag);
  return entry ? (size_t)entry->d_un.d_val : 0;
}

static int find_tables(elf_library *l) {
  l->symbols = table(l, DT_SYMTAB);
  l->strings = table(l, DT_STRTAB);
  l->hash = table(l, DT_HASH);
  if (!l->symbols || !l->strings || !l->hash) return fail("it exports no symbols");
  const ElfW(Dyn) *needed = find_dynamic(l, DT_NEEDED);
  if (needed) return fail("it needs %s", l->strings + needed->d_un.d_val);
  if (find_dynamic(l, DT_REL) || find_dynamic(l, DT_TEXTREL))
    return fail("it has relocations of a kind this loader does not know");
  return 0;
}

static int resolve(const elf_library *l, uint32_t index, uintptr_t *value) {
  const ElfW(Sym) *symbol = &l->symbols[index];
  const char *name = l->strings + symbol->st_name;
  if (index == 0 || symbol->st_shndx != SHN_UNDEF) {
    *value = index ? (uintptr_t)l->base + (uintptr_t)symbol->st_value : 0;
    return 0;
  }
  *value = (uintptr_t)elf_import(name);
  if (*value || symbol->st_info >> 4 == STB_WEAK) return 0;
  return fail("it needs '%s', which pocktvm-run does not have", name);
}

static int relocate(const elf_library *l, const ElfW(Rela) *list, size_t nbytes) {
  for (size_t i = 0; i < nbytes / sizeof *list; i++) {
    uint32_t type = (uint32_t)RELOCATION_TYPE(list[i].r_info);
    uintptr_t value = (uintptr_t)l->base, addend = (uintptr_t)list[i].r_addend;
    if (type == 0) continue;
    if (type != ABSOLUTE && type != GLOBAL_DATA && type != JUMP_SLOT && type != RELATIVE)
      return fail("relocation %u is not known", (unsigned)type);
    if (type != RELATIVE && resolve(l, (uint32_t)RELOCATION_SYMBOL(list[i].r_info), &value))
      return -1;
    value += type == ABSOLUTE || type == RELATIVE ? addend : 0;
    memcpy(l->base + list[i].r_offset, &value, sizeof value);
  }
  return 0;
}

void *elf_symbol(const elf_library *l, const char *name) {
  for (uint32_t i = 1; i < l->hash[1]; i++) {
    const ElfW(Sym) *symbol = &l->symbols[i];
    if (symbol->st_shndx != SHN_UNDEF && strcmp(l->strings + symbol->st_name, name) == 0)
      return l->base + symbol->st_value;
  }
  return NULL;
}

static void construct(const elf_library *l) {
  void (*const *functions)(void) = table(l, DT_INIT_ARRAY);
  size_t n = size_of(l, DT_INIT_ARRAYSZ) / sizeof *functions;
  for (size_t i = 0; functions && i < n; i++) functions[i]();
}

static int load(elf_library *l, int fd) {
  if (read_headers(l, fd) || reserve(l)) return -1;
  for (int i = 0; i < l->n_phdr; i++)
    if (l->phdr[i].p_type == PT_LOAD && map_segment(l, &l->phdr[i], fd)) return -1;
  if (find_tables(l) || relocate(l, table(l, DT_RELA), size_of(l, DT_RELASZ)) ||
      relocate(l, table(l, DT_JMPREL), size_of(l, DT_PLTRELSZ)))
    return -1;
  return protect(l);
}

elf_library *elf_open(const char *path) {
  static elf_library library;
  library = (elf_library){.page = (size_t)sysconf(_SC_PAGESIZE)};
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) {
    fail("%s", strerror(errno));
    return NULL;
  }
  int status = load(&library, fd);
  close(fd);
  if (status) return NULL;
  elf_describe(path, library.base, library.phdr, library.n_phdr);
  construct(&library);
  return &library;
}
