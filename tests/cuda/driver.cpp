/* libcuda.so.1 without a GPU: memory is the host's, launches are replayed (replay.h).
 *
 * Device addresses have a high bit set, so that a host that reads one dies, and a kernel handed a
 * host address is refused. Everything the launcher passes is checked: ranges of copies, addresses,
 * sizes of grids, that a function is in the image that was loaded, that a context is current.
 *
 * $FAKE_GPU: "none" (a driver that sees no GPU), or "major.minor megabytes"; default "8.7 8192". */
#include "replay.h"

#include <stdio.h>
#include <stdlib.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

typedef uint64_t address;
enum { INVALID = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, NO_CONTEXT = 201, NO_BINARY = 209,
       BAD_PTX = 218, NOT_FOUND = 500, LAUNCH_FAILED = 719 };
enum { MAX_BLOCKS = 64 };
static const address MARK = (address)1 << 60;

static struct {
  char *data;
  size_t nbytes;
} memory[MAX_BLOCKS];
static int context_current, retained;
static const char *last_error = "an error of the replaying driver";
static struct {
  const char *data;
  size_t nbytes;
} image;

static void settings(int *major, int *minor, size_t *nbytes) {
  double megabytes = 8192;
  const char *text = getenv("FAKE_GPU");
  *major = 8, *minor = 7;
  if (text) sscanf(text, "%d.%d %lf", major, minor, &megabytes);
  *nbytes = (size_t)(megabytes * 1e6);
}

static size_t used_bytes(void) {
  size_t used = 0;
  for (int i = 0; i < MAX_BLOCKS; i++) used += memory[i].nbytes;
  return used;
}

/* The host's pointer behind a device address, when nbytes from there are one allocation's. */
static char *host_of(address at, size_t nbytes) {
  char *place = (char *)(at & ~MARK);
  if (!(at & MARK)) return NULL;
  for (int i = 0; i < MAX_BLOCKS; i++)
    if (memory[i].data && place >= memory[i].data &&
        place + nbytes <= memory[i].data + memory[i].nbytes)
      return place;
  return NULL;
}

EXPORT int cuInit(unsigned flags) { return flags ? INVALID : 0; }

EXPORT int cuGetErrorString(int code, const char **text) {
  *text = last_error;
  return code ? 0 : INVALID;
}

EXPORT int cuDeviceGetCount(int *count) {
  const char *text = getenv("FAKE_GPU");
  *count = !text || strcmp(text, "none");
  return *count ? 0 : NO_DEVICE;
}

EXPORT int cuDeviceGet(int *device, int number) { return (*device = number) ? INVALID : 0; }

EXPORT int cuDeviceGetName(char *name, int room, int device) {
  snprintf(name, (size_t)room, "Replayed GPU %d", device);
  return 0;
}

EXPORT int cuDeviceGetAttribute(int *value, int attribute, int device) {
  int major, minor;
  size_t nbytes;
  settings(&major, &minor, &nbytes);
  *value = attribute == 75 ? major : minor;
  return device || (attribute != 75 && attribute != 76) ? INVALID : 0;
}

EXPORT int cuDevicePrimaryCtxRetain(void **context, int device) {
  retained++;
  *context = &context_current;
  return device ? INVALID : 0;
}

EXPORT int cuDevicePrimaryCtxRelease_v2(int device) {
  if (--retained == 0 && used_bytes()) fprintf(stderr, "replaying driver: memory was not freed\n");
  return device ? INVALID : 0;
}

EXPORT int cuCtxSetCurrent(void *context) {
  context_current = context == &context_current;
  return context_current ? 0 : INVALID;
}

EXPORT int cuMemGetInfo_v2(size_t *available, size_t *total) {
  int major, minor;
  settings(&major, &minor, total);
  *available = *total - used_bytes();
  return context_current ? 0 : NO_CONTEXT;
}

EXPORT int cuMemAlloc_v2(address *at, size_t nbytes) {
  size_t available, total;
  int i = 0;
  if (!context_current) return NO_CONTEXT;
  cuMemGetInfo_v2(&available, &total);
  if (nbytes == 0) return INVALID;
  if (nbytes > available) return OUT_OF_MEMORY;
  while (memory[i].data) i++;
  void *data;
  if (posix_memalign(&data, 256, nbytes)) return OUT_OF_MEMORY;
  memset(data, 0x7f, nbytes); /* garbage: 3.4e38 as floats */
  memory[i].data = (char *)data;
  memory[i].nbytes = nbytes;
  *at = (address)memory[i].data | MARK;
  return 0;
}

EXPORT int cuMemFree_v2(address at) {
  for (int i = 0; i < MAX_BLOCKS; i++)
    if (memory[i].data && ((address)memory[i].data | MARK) == at) {
      free(memory[i].data);
      memory[i].data = NULL;
      memory[i].nbytes = 0;
      return 0;
    }
  return INVALID;
}

EXPORT int cuMemcpyHtoDAsync_v2(address to, const void *from, size_t nbytes, void *stream) {
  char *place = host_of(to, nbytes);
  if (!context_current) return NO_CONTEXT;
  if (!place || !stream) return INVALID;
  memcpy(place, from, nbytes);
  return 0;
}

EXPORT int cuMemcpyDtoHAsync_v2(void *to, address from, size_t nbytes, void *stream) {
  char *place = host_of(from, nbytes);
  if (!context_current) return NO_CONTEXT;
  if (!place || !stream) return INVALID;
  memcpy(to, place, nbytes);
  return 0;
}

/* An ELF file for machine 190 (CUDA), or PTX; its length is in its headers, or it ends with NUL. */
EXPORT int cuModuleLoadDataEx(void **module, const void *data, unsigned n, int *options,
                              void **values) {
  const char *bytes = (const char *)data;
  (void)options, (void)values;
  if (!context_current) return NO_CONTEXT;
  if (n) return INVALID;
  image.data = bytes;
  if (!memcmp(bytes, "\177ELF", 4)) {
    uint16_t machine, n_sections, section_bytes;
    uint64_t sections;
    memcpy(&machine, bytes + 18, 2);
    memcpy(&sections, bytes + 40, 8);
    memcpy(&section_bytes, bytes + 58, 2);
    memcpy(&n_sections, bytes + 60, 2);
    image.nbytes = (size_t)sections + (size_t)n_sections * section_bytes;
    if (machine != 190) return NO_BINARY;
  } else {
    image.nbytes = strlen(bytes);
    if (!strstr(bytes, ".version")) return BAD_PTX;
  }
  *module = &image;
  return 0;
}

EXPORT int cuModuleUnload(void *module) { return module == &image ? 0 : INVALID; }

static int in_image(const char *name) {
  size_t length = strlen(name);
  for (size_t i = 0; i + length < image.nbytes; i++)
    if (!memcmp(image.data + i, name, length)) return 1;
  return 0;
}

EXPORT int cuModuleGetFunction(void **function, void *module, const char *name) {
  if (module != &image) return INVALID;
  for (const replay_kernel *k = replay_kernels; k->name; k++)
    if (!strcmp(k->name, name) && in_image(name)) {
      *function = (void *)k;
      return 0;
    }
  return NOT_FOUND;
}

EXPORT int cuStreamCreate(void **stream, unsigned flags) {
  *stream = &retained;
  return flags > 1 ? INVALID : 0;
}

EXPORT int cuStreamDestroy_v2(void *stream) { return stream == &retained ? 0 : INVALID; }

EXPORT int cuStreamSynchronize(void *stream) {
  return !context_current ? NO_CONTEXT : stream == &retained ? 0 : INVALID;
}

EXPORT int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                          unsigned by, unsigned bz, unsigned shared_bytes, void *stream,
                          void **parameters, void **extra) {
  const replay_kernel *kernel = (const replay_kernel *)function;
  const unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
  void *addresses[32];
  if (!context_current) return NO_CONTEXT;
  if (stream != &retained || shared_bytes || extra) return INVALID;
  for (int i = 0; i < kernel->n_args; i++) {
    address at;
    memcpy(&at, parameters[i], sizeof at);
    addresses[i] = host_of(at, 1);
    if (!addresses[i] || at % 64) return INVALID;
  }
  static int launches;
  replay_backwards(launches++ % 2); /* no order is promised, so none is kept */
  const char *why = replay_launch(kernel->name, grid, block, addresses);
  if (why) last_error = why;
  return why ? LAUNCH_FAILED : 0;
}
