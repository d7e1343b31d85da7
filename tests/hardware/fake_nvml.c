/* A stand-in for libnvidia-ml.so.1: the entry points that pynvml calls, answering from the text file $FAKE_NVML.
 *
 *   driver VERSION
 *   fail FUNCTION CODE              FUNCTION returns CODE (3: not supported)
 *   card UUID TOTAL USED MAJOR MINOR MIG NAME...         MiB; MIG: 0 or 1
 *   mig CARD UUID TOTAL USED NAME...                     an instance of card number CARD
 *   speed CARD CORES CLOCK MEMORY_CLOCK BUS      MHz and bits; without it these questions are not supported
 *   busy CARD PERCENT CELSIUS       its use now, and its temperature; without it these are not supported
 *   sample CARD TIME PERCENT        a sample of its use that the driver has kept
 *   process CARD compute|graphics PID MIB NAME...        MIB -1: not available
 *
 * Each shutdown appends a line to $FAKE_NVML.shutdown.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID = 2, NOT_FOUND = 6, TOO_SMALL = 7, MAX = 16 };
#define MIB (1024ULL * 1024ULL)

typedef struct {
    int used, parent, major, minor, mig, speed[4], busy, percent, celsius;
    long total, held;
    char uuid[96], name[96];
} Unit;
typedef struct { unsigned long long time; union { unsigned percent; double widest; } value; } Sample;
typedef struct { int card, graphics; unsigned pid; long held; char name[96]; } Process;
typedef struct { unsigned pid; unsigned long long held; unsigned gpu_instance, compute_instance; } ProcessInfo;

static Unit units[MAX];
static Process processes[MAX];
static struct { char function[80]; int code; } failures[MAX];
static struct { int card; Sample sample; } samples[MAX];
static int n_units, n_processes, n_failures, n_samples;
static char driver[80] = "550.54.14";

static int failing(const char *function) {
    for (int i = 0; i < n_failures; i++)
        if (!strcmp(failures[i].function, function)) return failures[i].code;
    return OK;
}
#define MAY_FAIL do { int code = failing(__func__); if (code) return code; } while (0)

static void load(void) {
    char line[512];
    FILE *file = fopen(getenv("FAKE_NVML"), "r");
    n_units = n_processes = n_failures = n_samples = 0;
    while (file && fgets(line, sizeof line, file)) {
        Unit unit = {.used = 1, .parent = -1};
        Process process = {0};
        int card, speed[4], percent, celsius;
        unsigned long long time;
        char kind[16];
        if (sscanf(line, "driver %79s", driver) == 1) continue;
        if (sscanf(line, "fail %79s %d", failures[n_failures].function, &failures[n_failures].code) == 2) n_failures++;
        else if (sscanf(line, "card %95s %ld %ld %d %d %d %95[^\n]", unit.uuid, &unit.total, &unit.held, &unit.major,
                        &unit.minor, &unit.mig, unit.name) == 7) units[n_units++] = unit;
        else if (sscanf(line, "mig %d %95s %ld %ld %95[^\n]", &unit.parent, unit.uuid, &unit.total, &unit.held,
                        unit.name) == 5) units[n_units++] = unit;
        else if (sscanf(line, "speed %d %d %d %d %d", &card, speed, speed + 1, speed + 2, speed + 3) == 5)
            memcpy(units[card].speed, speed, sizeof speed);
        else if (sscanf(line, "busy %d %d %d", &card, &percent, &celsius) == 3) {
            units[card].busy = 1, units[card].percent = percent, units[card].celsius = celsius;
        }
        else if (sscanf(line, "sample %d %llu %d", &card, &time, &percent) == 3) {
            samples[n_samples].card = card, samples[n_samples].sample.time = time;
            samples[n_samples++].sample.value.percent = percent;
        }
        else if (sscanf(line, "process %d %15s %u %ld %95[^\n]", &process.card, kind, &process.pid, &process.held,
                        process.name) == 5) {
            process.graphics = !strcmp(kind, "graphics");
            processes[n_processes++] = process;
        }
    }
    if (file) fclose(file);
}

/* The number-th unit that is a child of parent (-1: a card). */
static Unit *find(int parent, unsigned number) {
    for (int i = 0; i < n_units; i++)
        if (units[i].parent == parent && number-- == 0) return &units[i];
    return NULL;
}

static int card_number(Unit *unit) {
    int number = 0;
    for (Unit *u = units; u < unit; u++) number += u->parent == -1;
    return unit->parent == -1 ? number : -1;
}

static int copy(char *to, unsigned size, const char *text) {
    if (strlen(text) >= size) return TOO_SMALL;
    strcpy(to, text);
    return OK;
}

int nvmlInitWithFlags(unsigned flags) { (void)flags; load(); MAY_FAIL; return OK; }
const char *nvmlErrorString(int code) { (void)code; return "an error of the stand-in"; }

int nvmlShutdown(void) {
    char path[512];
    snprintf(path, sizeof path, "%s.shutdown", getenv("FAKE_NVML"));
    FILE *file = fopen(path, "a");
    if (file) { fputs("shutdown\n", file); fclose(file); }
    return OK;
}

int nvmlSystemGetDriverVersion(char *to, unsigned size) { MAY_FAIL; return copy(to, size, driver); }

int nvmlSystemGetProcessName(unsigned pid, char *to, unsigned size) {
    MAY_FAIL;
    for (int i = 0; i < n_processes; i++)
        if (processes[i].pid == pid) return copy(to, size, processes[i].name);
    return NOT_FOUND;
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    MAY_FAIL;
    *count = 0;
    while (find(-1, *count)) ++*count;
    return OK;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Unit **unit) {
    MAY_FAIL;
    *unit = find(-1, index);
    return *unit ? OK : INVALID;
}

int nvmlDeviceGetName(Unit *unit, char *to, unsigned size) { MAY_FAIL; return copy(to, size, unit->name); }
int nvmlDeviceGetUUID(Unit *unit, char *to, unsigned size) { MAY_FAIL; return copy(to, size, unit->uuid); }

int nvmlDeviceGetMemoryInfo(Unit *unit, unsigned long long *total_free_used) {
    MAY_FAIL;
    total_free_used[0] = unit->total * MIB;
    total_free_used[1] = (unit->total - unit->held) * MIB;
    total_free_used[2] = unit->held * MIB;
    return OK;
}

int nvmlDeviceGetCudaComputeCapability(Unit *unit, int *major, int *minor) {
    MAY_FAIL;
    if (unit->parent != -1) return 3;
    *major = unit->major;
    *minor = unit->minor;
    return OK;
}

/* The number-th figure of a card's speed; 3 (not supported) where there is none. */
static int speed(Unit *unit, int number, unsigned *figure) {
    *figure = unit->speed[number];
    return *figure ? OK : 3;
}

int nvmlDeviceGetNumGpuCores(Unit *unit, unsigned *figure) { MAY_FAIL; return speed(unit, 0, figure); }
int nvmlDeviceGetMemoryBusWidth(Unit *unit, unsigned *figure) { MAY_FAIL; return speed(unit, 3, figure); }

int nvmlDeviceGetMaxClockInfo(Unit *unit, int kind, unsigned *figure) {  /* 1: the cores, 2: the memory */
    MAY_FAIL;
    return kind == 1 || kind == 2 ? speed(unit, kind, figure) : INVALID;
}

static int list(Unit *unit, int graphics, unsigned *count, ProcessInfo *info) {
    unsigned room = info ? *count : 0, found = 0;
    for (int i = 0; i < n_processes; i++) {
        if (processes[i].graphics != graphics || processes[i].card != card_number(unit)) continue;
        if (found < room) {
            unsigned long long held = processes[i].held < 0 ? ~0ULL : processes[i].held * MIB;
            info[found] = (ProcessInfo){processes[i].pid, held, ~0U, ~0U};
        }
        found++;
    }
    *count = found;
    return found > room ? TOO_SMALL : OK;
}

int nvmlDeviceGetComputeRunningProcesses_v3(Unit *u, unsigned *n, ProcessInfo *p) { MAY_FAIL; return list(u, 0, n, p); }
int nvmlDeviceGetGraphicsRunningProcesses_v3(Unit *u, unsigned *n, ProcessInfo *p) { MAY_FAIL; return list(u, 1, n, p); }

int nvmlDeviceGetMigMode(Unit *unit, unsigned *current, unsigned *pending) {
    MAY_FAIL;
    *current = *pending = unit->mig;
    return OK;
}

int nvmlDeviceGetMaxMigDeviceCount(Unit *unit, unsigned *count) { MAY_FAIL; *count = unit->mig ? 7 : 0; return OK; }

int nvmlDeviceGetMigDeviceHandleByIndex(Unit *unit, unsigned index, Unit **instance) {
    MAY_FAIL;
    *instance = find(card_number(unit), index);
    return *instance ? OK : NOT_FOUND;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, Unit **unit) {
    MAY_FAIL;
    for (int i = 0; i < n_units; i++)
        if (!strcmp(units[i].uuid, uuid)) { *unit = &units[i]; return OK; }
    return NOT_FOUND;
}

int nvmlDeviceGetUtilizationRates(Unit *unit, unsigned *gpu_memory) {
    MAY_FAIL;
    gpu_memory[0] = unit->percent;
    gpu_memory[1] = 0;
    return unit->busy ? OK : 3;
}

int nvmlDeviceGetTemperature(Unit *unit, int sensor, unsigned *celsius) {
    MAY_FAIL;
    *celsius = unit->celsius;
    return unit->busy && !sensor ? OK : 3;
}

int nvmlDeviceGetSamples(Unit *unit, int kind, unsigned long long since, int *type, unsigned *count, Sample *found) {
    MAY_FAIL;
    unsigned there = 0;
    *type = 1;  /* unsigned int */
    for (int i = 0; i < n_samples; i++) {
        if (kind != 1 || samples[i].card != card_number(unit) || samples[i].sample.time <= since) continue;
        if (found) found[there] = samples[i].sample;
        there++;
    }
    *count = there;
    return there ? OK : NOT_FOUND;
}
