/* Makes a signal, or a failed allocation, arrive at one chosen point of a program in Python.
 *
 * Theory of operation
 *
 * A signal that arrives is only noted by CPython's C handler. The interpreter runs the handler in
 * Python later, in the main thread, when it next looks at its "eval breaker": at the entry of a
 * function, at a jump backward, and after most calls. Which of these looks finds the signal is a
 * matter of chance, so a fault that needs one certain look shows once in a million runs.
 *
 * Here a trace function in C counts the bytecodes that are executed in the frames of chosen files.
 * Before the n-th of them it does what the C handler does: it notes the signal, by
 * PyErr_SetInterruptEx(). The interpreter takes it from there. A signal is therefore handled only
 * where a real one can be handled, and a run with each n in turn passes through all such points.
 *
 *   arm(parts, n, signal)   count; at the n-th bytecode note the signal. n = -1 only counts
 *   again()                 -> bytecodes counted so far; the next one notes the signal again.
 *                           Called by a handler, it tells the points apart: a signal at any
 *                           bytecode from the last n up to this number is handled at this one look
 *   disarm()                -> (bytecodes counted, whether it was noted, "file:line in function")
 *
 * Failing allocations work the same way: the allocators of all three of CPython's domains are
 * wrapped, the allocations of the calling thread are counted, and `count` of them from the n-th
 * on return NULL.
 *
 *   fail_allocations(n, count)  count; fail. n = -1 only counts
 *   restore_allocations()       -> (allocations counted, whether one failed)
 *
 * Both are of one thread at a time: who arms disarms, in the same thread. Other threads run
 * untouched; in a build without a GIL too, as they never write to what is below.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <frameobject.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <string.h>

/* --- a signal at the n-th bytecode ---------------------------------------------------- */

#define MAX_PARTS 8
#define PART_SIZE 256

static struct {
    long long target;             /* -1: only count */
    long long count;
    int signal;
    bool noted;
    int parts;                    /* a frame counts if its file's name contains one of these */
    char part[MAX_PARTS][PART_SIZE];
    char where[1024];
} point;

static bool counts(const char *file)
{
    for (int i = 0; file != NULL && i < point.parts; i++)
        if (strstr(file, point.part[i]) != NULL)
            return true;
    return false;
}

/* Asks for an event for each bytecode of a frame. The exception that may be under way is kept. */
static void watch(PyFrameObject *frame)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    if (PyObject_SetAttrString((PyObject *)frame, "f_trace_opcodes", Py_True) < 0
        || PyObject_SetAttrString((PyObject *)frame, "f_trace_lines", Py_False) < 0)
        PyErr_Clear();
    PyErr_Restore(type, value, traceback);
}

static int trace(PyObject *self, PyFrameObject *frame, int event, PyObject *argument)
{
    (void)self;
    (void)argument;
    if (event != PyTrace_CALL && event != PyTrace_OPCODE)
        return 0;
    PyCodeObject *code = PyFrame_GetCode(frame);
    const char *file = PyUnicode_AsUTF8(code->co_filename);
    if (file == NULL)
        PyErr_Clear();
    else if (counts(file)) {
        if (event == PyTrace_CALL)
            watch(frame);
        else if (point.count++ == point.target && !point.noted) {
            const char *name = PyUnicode_AsUTF8(code->co_qualname);
            if (name == NULL)
                PyErr_Clear();
            snprintf(point.where, sizeof point.where, "%s:%d in %s", file,
                     PyFrame_GetLineNumber(frame), name == NULL ? "?" : name);
            point.noted = true;
            PyErr_SetInterruptEx(point.signal);
        }
    }
    Py_DECREF(code);
    return 0;
}

static PyObject *arm(PyObject *module, PyObject *arguments)
{
    (void)module;
    PyObject *parts;
    long long target;
    int number;
    if (!PyArg_ParseTuple(arguments, "O!Li", &PyTuple_Type, &parts, &target, &number))
        return NULL;
    Py_ssize_t size = PyTuple_GET_SIZE(parts);
    if (size > MAX_PARTS)
        return PyErr_Format(PyExc_ValueError, "%zd parts of file names: at most %d", size, MAX_PARTS);
    for (Py_ssize_t i = 0; i < size; i++) {
        const char *part = PyUnicode_AsUTF8(PyTuple_GET_ITEM(parts, i));
        if (part == NULL)
            return NULL;
        if (strlen(part) >= PART_SIZE)
            return PyErr_Format(PyExc_ValueError, "a part of a file name is longer than %d bytes",
                                PART_SIZE - 1);
        strcpy(point.part[i], part);
    }
    point.parts = (int)size;
    point.target = target;
    point.signal = number;
    point.count = 0;
    point.noted = false;
    point.where[0] = 0;
    PyEval_SetTrace(trace, NULL);
    Py_RETURN_NONE;
}

static PyObject *again(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    point.target = point.count;
    point.noted = false;
    return PyLong_FromLongLong(point.count);
}

static PyObject *disarm(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    PyEval_SetTrace(NULL, NULL);
    return Py_BuildValue("LOs", point.count, point.noted ? Py_True : Py_False, point.where);
}

/* --- a failed allocation ---------------------------------------------------------------- */

static const PyMemAllocatorDomain domains[] = {PYMEM_DOMAIN_RAW, PYMEM_DOMAIN_MEM, PYMEM_DOMAIN_OBJ};
#define DOMAINS (sizeof domains / sizeof *domains)

static PyMemAllocatorEx originals[DOMAINS];
static bool wrapped, counting, failed;
static pthread_t counted_thread;
static long long allocations, first_failing, end_failing;

static bool must_fail(void)
{
    if (!counting || !pthread_equal(pthread_self(), counted_thread))
        return false;
    long long number = allocations++;
    if (number < first_failing || number >= end_failing)
        return false;
    failed = true;
    return true;
}

static void *wrapped_malloc(void *original, size_t size)
{
    PyMemAllocatorEx *allocator = original;
    return must_fail() ? NULL : allocator->malloc(allocator->ctx, size);
}

static void *wrapped_calloc(void *original, size_t count, size_t size)
{
    PyMemAllocatorEx *allocator = original;
    return must_fail() ? NULL : allocator->calloc(allocator->ctx, count, size);
}

/* Code may rely on a block becoming smaller: CPython's does. It is not told from one that grows. */
static void *wrapped_realloc(void *original, void *block, size_t size)
{
    PyMemAllocatorEx *allocator = original;
    return must_fail() ? NULL : allocator->realloc(allocator->ctx, block, size);
}

static void wrapped_free(void *original, void *block)
{
    PyMemAllocatorEx *allocator = original;
    allocator->free(allocator->ctx, block);
}

static PyObject *fail_allocations(PyObject *module, PyObject *arguments)
{
    (void)module;
    long long first, count;
    if (!PyArg_ParseTuple(arguments, "LL", &first, &count))
        return NULL;
    /* They stay wrapped: other threads may be inside of one. */
    for (size_t i = 0; !wrapped && i < DOMAINS; i++) {
        PyMem_GetAllocator(domains[i], &originals[i]);
        PyMemAllocatorEx wrapper = {&originals[i], wrapped_malloc, wrapped_calloc,
                                    wrapped_realloc, wrapped_free};
        PyMem_SetAllocator(domains[i], &wrapper);
    }
    wrapped = true;
    allocations = 0;
    failed = false;
    first_failing = first < 0 ? -1 : first;
    end_failing = first < 0 ? -1 : first + count;
    counted_thread = pthread_self();
    counting = true;
    Py_RETURN_NONE;
}

static PyObject *restore_allocations(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    counting = false;
    return Py_BuildValue("LO", allocations, failed ? Py_True : Py_False);
}

static PyMethodDef methods[] = {
    {"arm", arm, METH_VARARGS, "Count bytecodes; note a signal at the n-th."},
    {"again", again, METH_NOARGS, "Note the signal at the next bytecode; return its number."},
    {"disarm", disarm, METH_NOARGS, "Stop; return the count, whether it was noted, and where."},
    {"fail_allocations", fail_allocations, METH_VARARGS, "Count allocations; fail some."},
    {"restore_allocations", restore_allocations, METH_NOARGS, "Stop; return count and whether."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_inject", NULL, -1, methods,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__inject(void)
{
    PyObject *made = PyModule_Create(&module);
#ifdef Py_GIL_DISABLED
    if (made != NULL)
        PyUnstable_Module_SetGIL(made, Py_MOD_GIL_NOT_USED);
#endif
    return made;
}
