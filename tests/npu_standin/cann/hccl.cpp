// HCCL between processes of one machine: message number i from one rank of a communicator to another is a file in
// STANDIN_MAILBOX. Reductions run in the order of the ranks, so results are the same on all of them. What would hang or
// corrupt memory on devices, ranks in different collectives or of other sizes, is an error that names both.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fcntl.h>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <sys/stat.h>
#include <unistd.h>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))
#define TRY(call) do { if (int error_ = (call)) return error_; } while (0)

namespace {
enum { OK = 0, BAD_ARGUMENT = 1, INTERNAL = 4, NOT_SUPPORTED = 5, TIMEOUT = 9 };
enum Type { INT8, INT16, INT32, FP16, FP32, INT64, UINT64, UINT8, UINT16, UINT32, FP64, BF16 };
enum Operation { SUM, PROD, MAX, MIN };

struct Header { char collective[16]; uint64_t bytes; };
struct Comm {
  std::string name;
  uint32_t size, rank;
  std::map<uint32_t, uint64_t> sent, received;  // messages to and from each rank
};
Comm& comm(void* handle) { return *static_cast<Comm*>(handle); }

size_t size_of(int type) {
  static const size_t sizes[] = {1, 2, 4, 2, 4, 8, 8, 1, 2, 4, 8, 2};
  return type < 12 ? sizes[type] : 1;
}

std::string mailbox(const Comm& c, uint32_t from, uint32_t to, uint64_t number) {
  const char* folder = getenv("STANDIN_MAILBOX");
  return std::string(folder ? folder : "/dev/shm") + "/" + c.name + "." + std::to_string(from) + "." +
         std::to_string(to) + "." + std::to_string(number);
}

bool all(ssize_t (*transfer)(int, char*, size_t), int file, char* data, size_t bytes) {
  for (size_t done = 0; done < bytes;) {
    ssize_t n = transfer(file, data + done, bytes - done);
    if (n <= 0) return false;
    done += (size_t)n;
  }
  return true;
}
ssize_t write_some(int file, char* data, size_t bytes) { return write(file, data, bytes); }
ssize_t read_some(int file, char* data, size_t bytes) { return read(file, data, bytes); }

int post(Comm& c, const char* collective, uint32_t to, const void* data, uint64_t bytes) {
  std::string path = mailbox(c, c.rank, to, c.sent[to]++), unfinished = path + ".part";
  int file = open(unfinished.c_str(), O_CREAT | O_WRONLY | O_TRUNC, 0600);
  Header header{};
  strncpy(header.collective, collective, sizeof header.collective - 1);
  header.bytes = bytes;
  bool written = file >= 0 && all(write_some, file, (char*)&header, sizeof header) &&
                 all(write_some, file, (char*)data, bytes);
  if (file >= 0) close(file);
  return written && rename(unfinished.c_str(), path.c_str()) == 0 ? OK : INTERNAL;
}

int take(Comm& c, const char* collective, uint32_t from, void* data, uint64_t bytes) {
  std::string path = mailbox(c, from, c.rank, c.received[from]++);
  const char* seconds = getenv("STANDIN_TIMEOUT");
  time_t end = time(nullptr) + (seconds ? atol(seconds) : 100);
  long pause = 2000;
  int file;
  while ((file = open(path.c_str(), O_RDONLY)) < 0) {
    if (time(nullptr) > end) {
      fprintf(stderr, "stand-in for HCCL: rank %u waits for rank %u in %s\n", c.rank, from, collective);
      return TIMEOUT;
    }
    timespec t{0, pause};
    nanosleep(&t, nullptr);
    if (pause < 500000) pause *= 2;
  }
  Header header{};
  bool fits = all(read_some, file, (char*)&header, sizeof header) && header.bytes == bytes &&
              !strcmp(header.collective, collective);
  bool read = fits && all(read_some, file, (char*)data, bytes);
  close(file);
  unlink(path.c_str());
  if (!fits)
    fprintf(stderr, "stand-in for HCCL: rank %u expects %llu bytes from rank %u in %s, which sent %llu in %s\n", c.rank,
            (unsigned long long)bytes, from, collective, (unsigned long long)header.bytes, header.collective);
  return read ? OK : BAD_ARGUMENT;
}

struct Part { const void* data; uint64_t bytes; };

// The two halves of all collectives: a part for each other rank, and then what each rank has sent here.
using Parts = std::function<Part(uint32_t)>;
int send_parts(Comm& c, const char* collective, const Parts& outgoing) {
  for (uint32_t to = 0; to < c.size; to++)
    if (to != c.rank) TRY(post(c, collective, to, outgoing(to).data, outgoing(to).bytes));
  return OK;
}
int fetch(Comm& c, const char* collective, uint32_t from, const Parts& outgoing, void* place, uint64_t bytes) {
  if (from != c.rank) return take(c, collective, from, place, bytes);
  if (outgoing(from).bytes != bytes) return BAD_ARGUMENT;
  if (bytes) memmove(place, outgoing(from).data, bytes);
  return OK;
}

float from_bf16(uint16_t v) { uint32_t u = (uint32_t)v << 16; float f; memcpy(&f, &u, 4); return f; }
uint16_t to_bf16(float f) {
  if (std::isnan(f)) return 0x7fc0;
  uint32_t u; memcpy(&u, &f, 4);
  return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
float from_fp16(uint16_t v) { _Float16 h; memcpy(&h, &v, 2); return (float)h; }
uint16_t to_fp16(float f) { _Float16 h = (_Float16)f; uint16_t v; memcpy(&v, &h, 2); return v; }

template <class T> T combine(T a, T b, int operation) {
  switch (operation) { case SUM: return (T)(a + b); case PROD: return (T)(a * b); case MAX: return a > b ? a : b; }
  return a < b ? a : b;
}
template <class T> int reduce(void* total, const void* other, size_t count, int operation) {
  for (size_t i = 0; i < count; i++) ((T*)total)[i] = combine(((T*)total)[i], ((const T*)other)[i], operation);
  return OK;
}
int reduce_half(void* into, const void* from, size_t count, int operation, float (*wide)(uint16_t),
                uint16_t (*narrow)(float)) {
  auto* total = (uint16_t*)into;
  auto* other = (const uint16_t*)from;
  for (size_t i = 0; i < count; i++) total[i] = narrow(combine(wide(total[i]), wide(other[i]), operation));
  return OK;
}
int reduce_into(void* total, const void* other, size_t count, int type, int operation) {
  switch (type) {
    case INT8: return reduce<int8_t>(total, other, count, operation);
    case INT16: return reduce<int16_t>(total, other, count, operation);
    case INT32: return reduce<int32_t>(total, other, count, operation);
    case INT64: return reduce<int64_t>(total, other, count, operation);
    case FP32: return reduce<float>(total, other, count, operation);
    case FP16: return reduce_half(total, other, count, operation, from_fp16, to_fp16);
    case BF16: return reduce_half(total, other, count, operation, from_bf16, to_bf16);
  }
  return NOT_SUPPORTED;  // HCCL reduces no float64
}

// `out` becomes the reduction of the parts that come here.
int reduce_parts(Comm& c, const char* collective, const Parts& outgoing, void* out, uint64_t count, int type,
                 int operation) {
  uint64_t bytes = count * size_of(type);
  std::vector<char> total(bytes), part(bytes);
  TRY(send_parts(c, collective, outgoing));
  for (uint32_t from = 0; from < c.size; from++) {
    TRY(fetch(c, collective, from, outgoing, from ? part.data() : total.data(), bytes));
    if (from) TRY(reduce_into(total.data(), part.data(), count, type, operation));
  }
  if (bytes) memcpy(out, total.data(), bytes);
  return OK;
}
// Each part that comes here goes to its place.
int place_parts(Comm& c, const char* collective, const Parts& outgoing, const Parts& places) {
  TRY(send_parts(c, collective, outgoing));
  for (uint32_t from = 0; from < c.size; from++)
    TRY(fetch(c, collective, from, outgoing, const_cast<void*>(places(from).data), places(from).bytes));
  return OK;
}
Part part(const void* base, uint64_t offset, uint64_t count, int type) {
  return {(const char*)base + offset * size_of(type), count * size_of(type)};
}
const uint64_t* numbers(const void* pointer) { return static_cast<const uint64_t*>(pointer); }
}  // namespace

// ---- communicators

struct RootInfo { char name[4108]; };
API int HcclGetRootInfo(RootInfo* info) {
  std::random_device random;
  snprintf(info->name, sizeof info->name, "hccl-%d-%08x%08x", (int)getpid(), random(), random());
  return OK;
}
API int HcclCommInitRootInfo(uint32_t size, const RootInfo* info, uint32_t rank, void** out) {
  *out = new Comm{info->name, size, rank, {}, {}};
  return OK;
}
API int HcclCommInitRootInfoConfig(uint32_t size, const RootInfo* info, uint32_t rank, void*, void** out) {
  return HcclCommInitRootInfo(size, info, rank, out);
}
API int HcclCreateSubCommConfig(void** parent, uint32_t size, uint32_t* ranks, uint64_t id, uint32_t rank, void*,
                                void** out) {
  std::string name = comm(*parent).name + "_" + std::to_string(id);
  for (uint32_t i = 0; i < size; i++) name += "-" + std::to_string(ranks[i]);
  *out = new Comm{name, size, rank, {}, {}};
  return OK;
}
API int HcclCommDestroy(void* c) { delete static_cast<Comm*>(c); return OK; }
API int HcclGetCommAsyncError(void*, int* error) { *error = OK; return OK; }
API int HcclGetCommName(void* c, char* name) { snprintf(name, 128, "%s", comm(c).name.c_str()); return OK; }
API uint32_t HcclGetCommConfigCapability() { return 12; }
API const char* HcclGetErrorString(int) { return "see the message of the stand-in for HCCL"; }

// ---- collectives; counts are of elements

API int HcclAllReduce(void* in, void* out, uint64_t count, int type, int operation, void* c, void*) {
  return reduce_parts(comm(c), "all_reduce", [&](uint32_t) { return part(in, 0, count, type); }, out, count, type,
                      operation);
}
API int HcclReduceScatter(void* in, void* out, uint64_t count, int type, int operation, void* c, void*) {
  return reduce_parts(comm(c), "reduce_scatter", [&](uint32_t to) { return part(in, to * count, count, type); }, out,
                         count, type, operation);
}
API int HcclReduceScatterV(const void* in, const void* counts, const void* offsets, void* out, uint64_t count, int type,
                           int operation, void* c, void*) {
  return reduce_parts(comm(c), "reduce_scatter_v",
                         [&](uint32_t to) { return part(in, numbers(offsets)[to], numbers(counts)[to], type); }, out,
                         count, type, operation);
}
API int HcclReduce(void* in, void* out, uint64_t count, int type, int operation, uint32_t root, void* c, void*) {
  std::vector<char> unused(count * size_of(type));
  void* place = comm(c).rank == root ? out : unused.data();
  return reduce_parts(comm(c), "reduce", [&](uint32_t) { return part(in, 0, count, type); }, place, count, type,
                      operation);
}
API int HcclAllGather(void* in, void* out, uint64_t count, int type, void* c, void*) {
  return place_parts(comm(c), "all_gather", [&](uint32_t) { return part(in, 0, count, type); },
                        [&](uint32_t from) { return part(out, from * count, count, type); });
}
API int HcclAllGatherV(const void* in, uint64_t count, const void* out, const void* counts, const void* offsets,
                       int type, void* c, void*) {
  return place_parts(comm(c), "all_gather_v", [&](uint32_t) { return part(in, 0, count, type); },
                        [&](uint32_t from) { return part(out, numbers(offsets)[from], numbers(counts)[from], type); });
}
API int HcclAlltoAllV(const void* in, const void* in_counts, const void* in_offsets, int in_type, const void* out,
                      const void* out_counts, const void* out_offsets, int out_type, void* c, void*) {
  return place_parts(
      comm(c), "all_to_all",
      [&](uint32_t to) { return part(in, numbers(in_offsets)[to], numbers(in_counts)[to], in_type); },
      [&](uint32_t from) { return part(out, numbers(out_offsets)[from], numbers(out_counts)[from], out_type); });
}
API int HcclAlltoAll(const void* in, uint64_t in_count, int in_type, const void* out, uint64_t out_count, int out_type,
                     void* c, void*) {
  return place_parts(comm(c), "all_to_all",
                        [&](uint32_t to) { return part(in, to * in_count, in_count, in_type); },
                        [&](uint32_t from) { return part(out, from * out_count, out_count, out_type); });
}
API int HcclBroadcast(void* data, uint64_t count, int type, uint32_t root, void* handle, void*) {
  Comm& c = comm(handle);
  uint64_t bytes = count * size_of(type);
  if (c.rank != root) return take(c, "broadcast", root, data, bytes);
  for (uint32_t to = 0; to < c.size; to++)
    if (to != root) TRY(post(c, "broadcast", to, data, bytes));
  return OK;
}
API int HcclScatter(void* in, void* out, uint64_t count, int type, uint32_t root, void* handle, void*) {
  Comm& c = comm(handle);
  uint64_t bytes = count * size_of(type);
  if (c.rank != root) return take(c, "scatter", root, out, bytes);
  for (uint32_t to = 0; to < c.size; to++) {
    Part p = part(in, to * count, count, type);
    if (to != root) TRY(post(c, "scatter", to, p.data, p.bytes));
    else memmove(out, p.data, p.bytes);
  }
  return OK;
}
API int HcclBarrier(void* c, void*) { int in = 0, out; return HcclAllReduce(&in, &out, 1, INT32, SUM, c, nullptr); }
API int HcclSend(void* data, uint64_t count, int type, uint32_t to, void* c, void*) {
  return post(comm(c), "send", to, data, count * size_of(type));
}
API int HcclRecv(void* data, uint64_t count, int type, uint32_t from, void* c, void*) {
  return take(comm(c), "send", from, data, count * size_of(type));
}
struct SendOrReceive { int kind; void* data; uint64_t count; int type; uint32_t peer; };
API int HcclBatchSendRecv(SendOrReceive* items, uint32_t number, void* c, void*) {
  for (uint32_t i = 0; i < number; i++)
    if (items[i].kind == 0) TRY(HcclSend(items[i].data, items[i].count, items[i].type, items[i].peer, c, nullptr));
  for (uint32_t i = 0; i < number; i++)
    if (items[i].kind == 1) TRY(HcclRecv(items[i].data, items[i].count, items[i].type, items[i].peer, c, nullptr));
  return OK;
}
