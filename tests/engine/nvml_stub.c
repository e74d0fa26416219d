/* Stands for the NVIDIA driver's libnvidia-ml.so.1: answers as the file $NVML_STUB says, which is read at every call.
 *
 *     gpu UUID TOTAL RESERVED USED     a GPU; its index counts
 *     mig UUID TOTAL RESERVED USED     a MIG device of the GPU above, which is in MIG mode with it
 *     process KIND PID BYTES           of the one above; KIND is Compute, Graphics or MPSCompute
 *     error FUNCTION INDEX CODE        what a function answers for a GPU; * for all, and for functions without one
 *     hang FUNCTION                    it does not come back as long as this stands there
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };
enum { MOST_DEVICES = 32, MOST_PROCESSES = 64, MOST_RULES = 32 };

typedef unsigned long long bytes;

struct process {
    char kind[16];
    unsigned pid;
    bytes size;
};

struct device {
    char uuid[80];
    bytes total, reserved, used;
    int gpu, part; /* part: -1 for the GPU itself */
    int processes;
    struct process process[MOST_PROCESSES];
};

struct rule {
    char function[64], index[8];
    int code;
};

static _Thread_local struct device devices[MOST_DEVICES];
static _Thread_local struct rule rules[MOST_RULES];
static _Thread_local int count, gpus, ruled;

/* Whether the function is to hang. */
static int read_file(const char *function)
{
    const char *name = getenv("NVML_STUB");
    FILE *file = name ? fopen(name, "r") : NULL;
    char line[256], hangs[64];
    int hang = 0;
    count = gpus = ruled = 0;
    while (file && fgets(line, sizeof line, file)) {
        struct device *last = &devices[count], *above = count ? last - 1 : last;
        struct process *process = count ? &above->process[above->processes] : NULL;
        struct rule *rule = &rules[ruled];
        if (sscanf(line, "gpu %79s %llu %llu %llu", last->uuid, &last->total, &last->reserved, &last->used) == 4) {
            last->gpu = gpus++, last->part = -1, last->processes = 0, count++;
        } else if (sscanf(line, "mig %79s %llu %llu %llu", last->uuid, &last->total, &last->reserved, &last->used) == 4) {
            last->gpu = gpus - 1, last->part = above->part + 1, last->processes = 0, count++;
        } else if (process && sscanf(line, "process %15s %u %llu", process->kind, &process->pid, &process->size) == 3) {
            above->processes++;
        } else if (sscanf(line, "error %63s %7s %d", rule->function, rule->index, &rule->code) == 3) {
            ruled++;
        } else if (sscanf(line, "hang %63s", hangs) == 1) {
            hang |= !strcmp(hangs, function);
        }
    }
    if (file)
        fclose(file);
    return hang;
}

/* Reads the file, and answers what it says of this function. */
static int begin(const char *function, void *handle)
{
    while (read_file(function))
        usleep(10000);
    char index[8] = "*";
    if (handle)
        snprintf(index, sizeof index, "%d", devices[(long)handle - 1].gpu);
    for (struct rule *rule = rules; rule < rules + ruled; rule++)
        if (!strcmp(rule->function, function) && (!strcmp(rule->index, "*") || !strcmp(rule->index, index)))
            return rule->code;
    return SUCCESS;
}

#define BEGIN(handle)                                                                                                  \
    do {                                                                                                               \
        int code = begin(__func__, handle);                                                                            \
        if (code != SUCCESS)                                                                                           \
            return code;                                                                                               \
    } while (0)

static int find(int gpu, int part, void **handle)
{
    for (int at = 0; at < count; at++)
        if (devices[at].gpu == gpu && devices[at].part == part) {
            *handle = (void *)(long)(at + 1);
            return SUCCESS;
        }
    return NOT_FOUND;
}

const char *nvmlErrorString(int code)
{
    return code == 999 ? "Unknown Error" : "An Error";
}

int nvmlInitWithFlags(unsigned flags)
{
    (void)flags;
    BEGIN(NULL);
    return SUCCESS;
}

int nvmlShutdown(void)
{
    BEGIN(NULL);
    return SUCCESS;
}

int nvmlDeviceGetCount_v2(unsigned *found)
{
    BEGIN(NULL);
    *found = (unsigned)gpus;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle)
{
    read_file("");
    if (find((int)index, -1, handle) != SUCCESS)
        return INVALID_ARGUMENT;
    BEGIN(*handle);
    return SUCCESS;
}

int nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending)
{
    BEGIN(handle);
    void *part;
    *current = *pending = find(devices[(long)handle - 1].gpu, 0, &part) == SUCCESS;
    return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(void *handle, unsigned *most)
{
    BEGIN(handle);
    *most = 7;
    return SUCCESS;
}

int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, unsigned index, void **part)
{
    BEGIN(handle);
    return find(devices[(long)handle - 1].gpu, (int)index, part);
}

int nvmlDeviceGetUUID(void *handle, char *uuid, unsigned size)
{
    BEGIN(handle);
    snprintf(uuid, size, "%s", devices[(long)handle - 1].uuid);
    return SUCCESS;
}

int nvmlDeviceGetName(void *handle, char *name, unsigned size)
{
    BEGIN(handle);
    snprintf(name, size, "NVIDIA Stub");
    return SUCCESS;
}

struct memory {
    bytes total, free, used;
};

struct memory_v2 {
    unsigned version;
    bytes total, reserved, free, used;
};

int nvmlDeviceGetMemoryInfo(void *handle, struct memory *memory)
{
    BEGIN(handle);
    struct device *one = &devices[(long)handle - 1];
    *memory = (struct memory){one->total, one->total - one->reserved - one->used, one->reserved + one->used};
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo_v2(void *handle, struct memory_v2 *memory)
{
    BEGIN(handle);
    if (memory->version != (sizeof *memory | 2 << 24))
        return INVALID_ARGUMENT;
    struct device *one = &devices[(long)handle - 1];
    *memory = (struct memory_v2){memory->version, one->total, one->reserved, one->total - one->reserved - one->used,
                                 one->used};
    return SUCCESS;
}

struct listed {
    unsigned pid;
    bytes size;
    unsigned gpu_instance, compute_instance;
};

static int list(const char *kind, void *handle, unsigned *most, struct listed *into)
{
    struct device *one = &devices[(long)handle - 1];
    unsigned found = 0;
    for (int at = 0; at < one->processes; at++)
        if (!strcmp(one->process[at].kind, kind)) {
            if (found < *most && into)
                into[found] = (struct listed){one->process[at].pid, one->process[at].size, ~0u, ~0u};
            found++;
        }
    int fits = found <= *most;
    *most = found;
    return fits ? SUCCESS : INSUFFICIENT_SIZE;
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *most, struct listed *into)
{
    BEGIN(handle);
    return list("Compute", handle, most, into);
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(void *handle, unsigned *most, struct listed *into)
{
    BEGIN(handle);
    return list("Graphics", handle, most, into);
}

int nvmlDeviceGetMPSComputeRunningProcesses_v3(void *handle, unsigned *most, struct listed *into)
{
    BEGIN(handle);
    return list("MPSCompute", handle, most, into);
}
