// CUDA's driver, as far as Triton and the node call it: it launches nothing and writes down what it
// is handed. How many parameters a kernel takes, and how large each is, it reads in the kernel's own
// ELF image, as the real one does.
#include <elf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int Result;
enum { PARAMETER_INFO = 0x17, WITH_SIZE = 4, MOST = 96 };

typedef struct {
  char name[128];
  int count;
  uint32_t sizes[MOST];
} Function;

static void* context;

// In .nv.info.<name>: records of a format, an attribute and a size, and for a parameter its place
// among them (behind 4 bytes) and its size in the upper bits of its last word.
static void read_parameters(Function* f, const char* image) {
  const Elf64_Ehdr* header = (const void*)image;
  const Elf64_Shdr* sections = (const void*)(image + header->e_shoff);
  const char* names = image + sections[header->e_shstrndx].sh_offset;
  char wanted[160];
  snprintf(wanted, sizeof wanted, ".nv.info.%s", f->name);
  for (int i = 0; i < header->e_shnum; ++i) {
    if (strcmp(names + sections[i].sh_name, wanted)) continue;
    const unsigned char* p = (const void*)(image + sections[i].sh_offset);
    const unsigned char* end = p + sections[i].sh_size;
    while (p < end) {
      uint16_t size, place;
      uint32_t last;
      memcpy(&size, p + 2, 2);
      if (p[0] == WITH_SIZE && p[1] == PARAMETER_INFO) {
        memcpy(&place, p + 4 + 4, 2);
        memcpy(&last, p + 4 + 8, 4);
        f->sizes[place] = last >> 18;
        if (place >= f->count) f->count = place + 1;
      }
      p += 4 + (p[0] == WITH_SIZE ? size : 0);
    }
  }
}

static Result note(const char* by, Function* f, unsigned x, unsigned y, unsigned z, unsigned threads,
                   unsigned shared, void* stream, void** parameters, unsigned attributes) {
  FILE* log = fopen(getenv("LAUNCHES"), "a");
  fprintf(log, "%s %s %p %u,%u,%u %u %u %p %u", by, f->name, (void*)f, x, y, z, threads, shared,
          stream, attributes);
  for (int i = 0; i < f->count; ++i) {
    fprintf(log, " ");
    for (uint32_t j = 0; j < f->sizes[i]; ++j) {
      fprintf(log, "%02x", ((unsigned char*)parameters[i])[f->sizes[i] - 1 - j]);
    }
  }
  fprintf(log, "\n");
  fclose(log);
  return 0;
}

typedef struct {
  unsigned x, y, z, threads, threads_y, threads_z, shared;
  void* stream;
  void* attributes;
  unsigned count;
} Config;

Result cuLaunchKernelEx(const Config* c, Function* f, void** parameters, void** extra) {
  return note("Triton", f, c->x, c->y, c->z, c->threads, c->shared, c->stream, parameters, c->count);
}

Result cuLaunchKernel(Function* f, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned b,
                      unsigned c, unsigned shared, void* stream, void** parameters, void** extra) {
  return note("node", f, x, y, z, threads * b * c, shared, stream, parameters, 0);
}

Result cuModuleLoadData(void** module, const void* image) { return *module = (void*)image, 0; }
Result cuModuleGetFunction(Function** function, void* module, const char* name) {
  Function* f = *function = calloc(1, sizeof(Function));
  snprintf(f->name, sizeof f->name, "%s", name);
  read_parameters(f, module);
  return 0;
}
Result cuCtxGetCurrent(void** c) { return *c = context, 0; }
Result cuCtxSetCurrent(void* c) { return context = c, 0; }
Result cuDeviceGet(int* device, int i) { return *device = i, 0; }
Result cuDevicePrimaryCtxRetain(void** c, int device) { return *c = &context, 0; }
Result cuDeviceGetAttribute(int* value, int attribute, int device) { return *value = 232448, 0; }
Result cuFuncGetAttribute(int* value, int attribute, void* f) { return *value = attribute ? 0 : 1024, 0; }
Result cuFuncSetAttribute(void* f, int attribute, int value) { return 0; }
Result cuFuncSetCacheConfig(void* f, int config) { return 0; }
Result cuGetErrorString(int error, const char** said) { return *said = "an error", 0; }
Result cuPointerGetAttribute(void* value, int attribute, uint64_t pointer) {
  return *(uint64_t*)value = pointer, 0;
}
Result cuDriverGetVersion(int* version) { return *version = 13000, 0; }
Result cuCtxGetLimit(size_t* value, int limit) { return *value = 0, 0; }
Result cuCtxSetLimit(int limit, size_t value) { return 0; }
Result cuOccupancyMaxActiveClusters(int* n, void* f, void* config) { return *n = 1, 0; }
Result cuTensorMapEncodeTiled(void) { return 1; }
Result cuTensorMapEncodeIm2col(void) { return 1; }
