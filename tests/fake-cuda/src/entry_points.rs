//! The functions of `libcuda.so` that cudarc 0.19 calls, by their names in the driver.
//!
//! Each gives a `CUresult`. What there is no use for without a GPU says that it is not supported; it is here because a
//! missing symbol would end the process.

#![allow(non_snake_case, reason = "the names are the driver's")]
#![allow(clippy::missing_safety_doc, reason = "pointers are as the CUDA driver API says")]

use crate::codes::{self, Code};
use crate::driver::{Driver, Outcome, Work};
use crate::settings::Settings;
use attar_ptx::{Param, TensorMap};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::{LazyLock, Mutex, PoisonError};

static DRIVER: LazyLock<Mutex<Result<Driver, String>>> =
    LazyLock::new(|| Mutex::new(Settings::from_environment().map(Driver::new)));

/// Pinned memory of the host, by address: sizes in words of sixteen bytes.
static PINNED: Mutex<BTreeMap<usize, Box<[u128]>>> = Mutex::new(BTreeMap::new());

thread_local! {
    /// The current context of a thread: its device and one, or 0.
    static CURRENT: Cell<usize> = const { Cell::new(0) };
}

/// Runs `with` on the driver and gives the code.
fn call(with: impl FnOnce(&mut Driver) -> Outcome<()>) -> Code {
    let mut guard = DRIVER.lock().unwrap_or_else(PoisonError::into_inner);
    match &mut *guard {
        Ok(driver) => match with(driver) {
            Ok(()) => codes::SUCCESS,
            Err(code) => code,
        },
        Err(_) => codes::UNKNOWN,
    }
}

/// As `call`, on the device of the current context.
fn on_device(with: impl FnOnce(&mut Driver, usize) -> Outcome<()>) -> Code {
    call(|driver| {
        let device = CURRENT.get().checked_sub(1).ok_or(codes::INVALID_CONTEXT)?;
        with(driver, device)
    })
}

/// Stores a result where the caller wants it.
fn put<T>(to: *mut T, value: T) -> Outcome<()> {
    if to.is_null() {
        return Err(codes::INVALID_VALUE);
    }
    // SAFETY: not null, and by the driver's contract a place for one value.
    unsafe { to.write(value) };
    Ok(())
}

/// A list of numbers of the caller.
fn list<T: Copy>(from: *const T, n: usize) -> Outcome<Vec<T>> {
    if n == 0 {
        return Ok(Vec::new());
    }
    if from.is_null() {
        return Err(codes::INVALID_VALUE);
    }
    // SAFETY: not null, and by the driver's contract the beginning of `n` numbers.
    Ok(unsafe { std::slice::from_raw_parts(from, n) }.to_vec())
}

fn text<'a>(from: *const c_char) -> Outcome<&'a str> {
    if from.is_null() {
        return Err(codes::INVALID_VALUE);
    }
    // SAFETY: not null, and by the driver's contract a string that ends with NUL and outlives the call.
    unsafe { CStr::from_ptr(from) }.to_str().map_err(|_| codes::INVALID_VALUE)
}

/// Entry points: each body is the outcome of a call.
macro_rules! entry_points {
    ($(fn $name:ident($($arg:ident: $ty:ty),*) = $body:expr;)*) => {
        $(
            #[unsafe(no_mangle)]
            unsafe extern "C" fn $name($($arg: $ty),*) -> Code {
                $body
            }
        )*
    };
}

/// Entry points that are not supported, whatever their arguments: C callers clean up after themselves.
macro_rules! not_supported {
    ($($name:ident)*) => {
        $(
            #[unsafe(no_mangle)]
            unsafe extern "C" fn $name() -> Code {
                codes::NOT_SUPPORTED
            }
        )*
    };
}

entry_points! {
    // Devices.
    fn cuInit(_flags: c_uint) = init();
    fn cuDriverGetVersion(version: *mut c_int) = call(|d| put(version, d.settings.driver));
    fn cuDeviceGetCount(count: *mut c_int) = call(|d| put(count, d.device_count() as c_int));
    fn cuDeviceGet(device: *mut c_int, ordinal: c_int) = call(|d| {
        d.device(ordinal)?;
        put(device, ordinal)
    });
    fn cuDeviceGetName(name: *mut c_char, len: c_int, device: c_int) = call(|d| {
        d.device(device)?;
        let (major, minor) = d.settings.capability;
        device_name(name, len, &format!("PTX interpreter (no GPU), sm_{major}{minor}"))
    });
    fn cuDeviceGetUuid(uuid: *mut [u8; 16], device: c_int) = device_uuid(uuid, device);
    fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], device: c_int) = device_uuid(uuid, device);
    fn cuDeviceTotalMem_v2(bytes: *mut usize, device: c_int) = call(|d| {
        d.device(device)?;
        put(bytes, d.settings.memory)
    });
    fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, device: c_int) = call(|d| {
        d.device(device)?;
        put(value, device_attribute(d.settings.capability, attribute)?)
    });

    // Contexts.
    fn cuDevicePrimaryCtxRetain(context: *mut usize, device: c_int) = call(|d| {
        let device = d.device(device)?;
        d.working(device)?;
        d.retain(device);
        put(context, device + 1)
    });
    fn cuDevicePrimaryCtxRelease_v2(device: c_int) = call(|d| {
        let device = d.device(device)?;
        d.release(device)
    });
    fn cuCtxSetCurrent(context: usize) = call(|d| {
        if context > d.device_count() {
            return Err(codes::INVALID_CONTEXT);
        }
        CURRENT.set(context);
        Ok(())
    });
    fn cuCtxGetCurrent(context: *mut usize) = call(|_| put(context, CURRENT.get()));
    fn cuCtxGetDevice(device: *mut c_int) = on_device(|_, current| put(device, current as c_int));
    fn cuCtxSynchronize() = on_device(|d, current| d.working(current));
    fn cuCtxSetFlags(_flags: c_uint) = on_device(|_, _| Ok(()));
    fn cuCtxSetLimit(_limit: c_uint, _value: usize) = on_device(|_, _| Ok(()));
    fn cuCtxGetLimit(value: *mut usize, _limit: c_uint) = on_device(|_, _| put(value, 0));
    fn cuCtxSetCacheConfig(_config: c_uint) = on_device(|_, _| Ok(()));
    fn cuCtxGetCacheConfig(config: *mut c_uint) = on_device(|_, _| put(config, 0));
    fn cuCtxGetStreamPriorityRange(least: *mut c_int, greatest: *mut c_int) =
        on_device(|_, _| put(least, 0).and_then(|()| put(greatest, -5)));

    // Memory.
    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) = on_device(|d, current| {
        d.working(current)?;
        let info = d.memory_info(current);
        put(free, info.0)?;
        put(total, info.1)
    });
    fn cuMemAlloc_v2(address: *mut u64, len: usize) =
        on_device(|d, current| put(address, d.alloc(current, len)?));
    fn cuMemAllocAsync(address: *mut u64, len: usize, stream: usize) = on_device(|d, current| {
        if d.is_capturing(stream) {
            return Err(codes::STREAM_CAPTURE_UNSUPPORTED);
        }
        put(address, d.alloc(current, len)?)
    });
    fn cuMemFree_v2(address: u64) = call(|d| if address == 0 { Ok(()) } else { d.free(address) });
    fn cuMemFreeAsync(address: u64, _stream: usize) = call(|d| d.free(address));
    fn cuMemHostAlloc(address: *mut usize, len: usize, _flags: c_uint) = call(|_| put(address, pin(len)));
    fn cuMemAllocHost_v2(address: *mut usize, len: usize) = call(|_| put(address, pin(len)));
    fn cuMemFreeHost(address: usize) = {
        let mut pinned = PINNED.lock().unwrap_or_else(PoisonError::into_inner);
        if pinned.remove(&address).is_some() { codes::SUCCESS } else { codes::INVALID_VALUE }
    };
    fn cuMemHostRegister_v2(_address: usize, _len: usize, _flags: c_uint) = on_device(|_, _| Ok(()));
    fn cuMemHostUnregister(_address: usize) = on_device(|_, _| Ok(()));
    fn cuMemcpyHtoD_v2(to: u64, from: usize, len: usize) =
        on_device(|d, current| d.issue(0, current, Work::FromHost { to, from, len }));
    fn cuMemcpyHtoDAsync_v2(to: u64, from: usize, len: usize, stream: usize) =
        on_device(|d, current| d.issue(stream, current, Work::FromHost { to, from, len }));
    fn cuMemcpyDtoH_v2(to: usize, from: u64, len: usize) =
        on_device(|d, current| d.issue(0, current, Work::ToHost { to, from, len }));
    fn cuMemcpyDtoHAsync_v2(to: usize, from: u64, len: usize, stream: usize) =
        on_device(|d, current| d.issue(stream, current, Work::ToHost { to, from, len }));
    fn cuMemcpyDtoD_v2(to: u64, from: u64, len: usize) =
        on_device(|d, current| d.issue(0, current, Work::Copy { to, from, len }));
    fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, len: usize, stream: usize) =
        on_device(|d, current| d.issue(stream, current, Work::Copy { to, from, len }));
    fn cuMemsetD8_v2(to: u64, byte: u8, len: usize) =
        on_device(|d, current| d.issue(0, current, Work::Fill { to, byte, len }));
    fn cuMemsetD8Async(to: u64, byte: u8, len: usize, stream: usize) =
        on_device(|d, current| d.issue(stream, current, Work::Fill { to, byte, len }));

    // Modules and functions.
    fn cuModuleLoadData(module: *mut usize, image: *const c_char) = on_device(|d, current| {
        if image.is_null() {
            return Err(codes::INVALID_VALUE);
        }
        // SAFETY: an image ends with NUL, but for machine code, whose header has one.
        let bytes = unsafe { CStr::from_ptr(image) }.to_bytes();
        put(module, d.load(current, bytes)?)
    });
    fn cuModuleLoad(module: *mut usize, path: *const c_char) = on_device(|d, current| {
        let bytes = std::fs::read(text(path)?).map_err(|_| codes::FILE_NOT_FOUND)?;
        put(module, d.load(current, &bytes)?)
    });
    fn cuModuleUnload(module: usize) = call(|d| d.unload(module));
    fn cuModuleGetFunction(function: *mut usize, module: usize, name: *const c_char) =
        call(|d| put(function, d.function_of(module, text(name)?)?));
    fn cuModuleGetGlobal_v2(address: *mut u64, bytes: *mut usize, module: usize, name: *const c_char) =
        call(|d| {
            let variable = d.variable(module, text(name)?)?;
            // Either may be left out.
            let _ = put(address, variable.0);
            let _ = put(bytes, variable.1);
            Ok(())
        });
    fn cuFuncGetAttribute(value: *mut c_int, attribute: c_int, function: usize) =
        call(|d| put(value, d.function_attribute(function, attribute)?));
    fn cuFuncSetAttribute(function: usize, attribute: c_int, value: c_int) =
        call(|d| d.set_function_attribute(function, attribute, value));
    fn cuFuncSetCacheConfig(function: usize, _config: c_uint) = call(|d| d.function(function).map(|_| ()));

    fn cuTensorMapEncodeTiled(
        map: *mut [u8; 128],
        data_type: c_uint,
        rank: c_uint,
        address: u64,
        dims: *const u64,
        strides: *const u64,
        box_dims: *const u32,
        element_strides: *const u32,
        interleave: c_uint,
        swizzle: c_uint,
        _promotion: c_uint,
        fill: c_uint
    ) = call(|_| {
        let rank = rank as usize;
        if !(1..=5).contains(&rank) || interleave != 0 || fill != 0 {
            return Err(codes::INVALID_VALUE);
        }
        if list(element_strides, rank)?.iter().any(|s| *s != 1) {
            return Err(codes::NOT_SUPPORTED);
        }
        let element_bytes = match data_type {
            0 => 1,
            1 | 6 | 9 => 2,
            2 | 3 | 7 | 10..=12 => 4,
            4 | 5 | 8 => 8,
            _ => return Err(codes::INVALID_VALUE),
        };
        let swizzle = *[0, 32, 64, 128].get(swizzle as usize).ok_or(codes::NOT_SUPPORTED)?;
        let tensor = TensorMap {
            address,
            element_bytes,
            dims: list(dims, rank)?,
            strides: list(strides, rank - 1)?,
            box_dims: list(box_dims, rank)?,
            swizzle,
        };
        put(map, tensor.encode().map_err(|_| codes::INVALID_VALUE)?)
    });

    // Streams and events.
    fn cuStreamCreate(stream: *mut usize, _flags: c_uint) =
        on_device(|d, current| put(stream, d.new_stream(current)?));
    fn cuStreamCreateWithPriority(stream: *mut usize, _flags: c_uint, _priority: c_int) =
        on_device(|d, current| put(stream, d.new_stream(current)?));
    fn cuStreamDestroy_v2(stream: usize) = call(|d| d.drop_stream(stream));
    fn cuStreamSynchronize(stream: usize) = on_device(|d, current| d.synchronise(stream, current));
    fn cuStreamQuery(stream: usize) = on_device(|d, current| d.synchronise(stream, current));
    fn cuStreamWaitEvent(stream: usize, event: usize, _flags: c_uint) =
        on_device(|d, current| d.wait(stream, event, current));
    fn cuEventCreate(event: *mut usize, _flags: c_uint) = on_device(|d, _| put(event, d.new_event()));
    fn cuEventDestroy_v2(event: usize) = call(|d| d.drop_event(event));
    fn cuEventRecord(event: usize, stream: usize) = on_device(|d, current| d.record(event, stream, current));
    fn cuEventSynchronize(event: usize) = on_device(|d, current| d.event_done(event, current));
    fn cuEventQuery(event: usize) = on_device(|d, current| d.event_done(event, current));
    fn cuEventElapsedTime(milliseconds: *mut f32, start: usize, end: usize) =
        elapsed(milliseconds, start, end);
    fn cuEventElapsedTime_v2(milliseconds: *mut f32, start: usize, end: usize) =
        elapsed(milliseconds, start, end);

    // Launches.
    fn cuLaunchKernel(
        function: usize,
        grid_x: c_uint,
        grid_y: c_uint,
        grid_z: c_uint,
        block_x: c_uint,
        block_y: c_uint,
        block_z: c_uint,
        shared: c_uint,
        stream: usize,
        params: *const *const c_void,
        extra: *const *const c_void
    ) = {
        let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        let (attributes, attribute_count) = (std::ptr::null(), 0);
        if extra.is_null() {
            let config = LaunchConfig { grid, block, shared, stream, attributes, attribute_count };
            launch(function, &config, params)
        } else {
            codes::NOT_SUPPORTED
        }
    };
    fn cuLaunchKernelEx(
        config: *const LaunchConfig,
        function: usize,
        params: *const *const c_void,
        extra: *const *const c_void
    ) = {
        if config.is_null() || !extra.is_null() {
            codes::NOT_SUPPORTED
        } else {
            // SAFETY: by the driver's contract it is one.
            launch(function, unsafe { &*config }, params)
        }
    };
    fn cuLaunchHostFunc(stream: usize, function: usize, argument: usize) =
        on_device(|d, current| d.issue(stream, current, Work::Call { function, argument }));

    // Graphs.
    fn cuStreamBeginCapture_v2(stream: usize, _mode: c_uint) = call(|d| d.begin_capture(stream));
    fn cuStreamIsCapturing(stream: usize, status: *mut c_uint) =
        call(|d| put(status, c_uint::from(d.is_capturing(stream))));
    fn cuStreamEndCapture(stream: usize, graph: *mut usize) = call(|d| put(graph, d.end_capture(stream)?));
    fn cuGraphInstantiateWithFlags(executable: *mut usize, graph: usize, _flags: u64) =
        call(|d| put(executable, d.instantiate(graph)?));
    fn cuGraphUpload(executable: usize, _stream: usize) =
        on_device(|d, current| if d.has_graph(executable) { d.working(current) } else { Err(codes::INVALID_HANDLE) });
    fn cuGraphLaunch(executable: usize, stream: usize) =
        on_device(|d, current| d.launch_graph(executable, stream, current));
    fn cuGraphExecDestroy(executable: usize) = call(|d| d.drop_graph(executable));
    fn cuGraphDestroy(graph: usize) = call(|d| d.drop_graph(graph));

    // Words.
    fn cuGetErrorName(code: c_int, to: *mut *const c_char) = error_text(codes::name(code), to);
    fn cuGetErrorString(code: c_int, to: *mut *const c_char) = error_text(codes::words(code), to);
    fn cuProfilerStart() = codes::SUCCESS;
    fn cuProfilerStop() = codes::SUCCESS;
}

not_supported! {
    cuCtxCreate_v3
    cuCtxCreate_v4
    cuCtxDestroy_v2
    cuDestroyExternalMemory
    cuDeviceGetDefaultMemPool
    cuDeviceGetMemPool
    cuDeviceSetMemPool
    cuExternalMemoryGetMappedBuffer
    cuImportExternalMemory
    cuLaunchCooperativeKernel
    cuMemAdvise_v2
    cuMemAllocFromPoolAsync
    cuMemAllocManaged
    cuMemPoolCreate
    cuMemPoolDestroy
    cuMemPoolGetAttribute
    cuMemPoolSetAttribute
    cuMemPoolTrimTo
    cuMemPrefetchAsync_v2
    cuMemcpyPeerAsync
    cuOccupancyAvailableDynamicSMemPerBlock
    cuOccupancyMaxActiveBlocksPerMultiprocessor
    cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags
    cuOccupancyMaxActiveClusters
    cuOccupancyMaxPotentialBlockSize
    cuOccupancyMaxPotentialBlockSizeWithFlags
    cuOccupancyMaxPotentialClusterSize
    cuStreamAttachMemAsync
}

#[expect(clippy::print_stderr, reason = "a driver has no other way to say more than a code")]
fn init() -> Code {
    let guard = DRIVER.lock().unwrap_or_else(PoisonError::into_inner);
    match &*guard {
        Ok(driver) if driver.device_count() == 0 => codes::NO_DEVICE,
        Ok(_) => codes::SUCCESS,
        Err(why) => {
            eprintln!("fake CUDA driver (PTX interpreter): {why}");
            codes::UNKNOWN
        }
    }
}

fn device_name(to: *mut c_char, len: c_int, name: &str) -> Outcome<()> {
    let len = usize::try_from(len).ok().filter(|l| *l > 0 && !to.is_null()).ok_or(codes::INVALID_VALUE)?;
    let n = name.len().min(len - 1);
    // SAFETY: not null, and by the driver's contract a place for `len` bytes.
    let place = unsafe { std::slice::from_raw_parts_mut(to.cast::<u8>(), len) };
    place[..n].copy_from_slice(&name.as_bytes()[..n]);
    place[n] = 0;
    Ok(())
}

fn device_uuid(uuid: *mut [u8; 16], device: c_int) -> Code {
    call(|d| {
        let device = d.device(device)?;
        let mut value = *b"PTX interpreter0";
        value[15] += device as u8;
        put(uuid, value)
    })
}

/// Attributes by their number in `CUdevice_attribute`: those of a device of compute capability 9.0 where it matters.
fn device_attribute((major, minor): (i32, i32), attribute: c_int) -> Outcome<c_int> {
    Ok(match attribute {
        // Threads per block; block and grid dimensions.
        1..=3 => 1024,
        4 => 64,
        5 => i32::MAX,
        6 | 7 => 65535,
        // Shared memory of a block: by default, and opted in.
        8 => 48 << 10,
        97 => 227 << 10,
        // Of a multiprocessor.
        81 => 228 << 10,
        // Registers of a block and of a multiprocessor.
        12 | 82 => 65536,
        10 => 32,
        // Clock rates in kHz, and the width of the memory bus: nothing an interpreter has.
        13 | 36 | 37 => 0,
        16 => 132,
        // Unified addresses, managed memory, memory pools.
        41 | 115 => 1,
        39 => 2048,
        75 => major,
        76 => minor,
        // What a program may ask for and do without.
        _ => 0,
    })
}

fn pin(len: usize) -> usize {
    let memory = vec![0u128; len.div_ceil(16).max(1)].into_boxed_slice();
    let address = memory.as_ptr() as usize;
    PINNED.lock().unwrap_or_else(PoisonError::into_inner).insert(address, memory);
    address
}

/// Nothing here takes a time worth telling.
fn elapsed(milliseconds: *mut f32, start: usize, end: usize) -> Code {
    on_device(|d, current| {
        d.event_done(start, current)?;
        d.event_done(end, current)?;
        put(milliseconds, 0.0)
    })
}

fn error_text(found: Option<&'static CStr>, to: *mut *const c_char) -> Code {
    match found {
        Some(text) => call(|_| put(to, text.as_ptr())),
        None => codes::INVALID_VALUE,
    }
}

/// The driver's `CUlaunchConfig`.
#[repr(C)]
struct LaunchConfig {
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared: c_uint,
    stream: usize,
    attributes: *const LaunchAttribute,
    attribute_count: c_uint,
}

/// The driver's `CUlaunchAttribute`, a value of 64 bytes behind its kind.
#[repr(C)]
struct LaunchAttribute {
    kind: c_uint,
    _pad: [u8; 4],
    value: c_int,
    _rest: [u8; 60],
}

/// The kind that lets a launch begin before the one before has ended.
const PROGRAMMATIC_STREAM_SERIALIZATION: c_uint = 6;

fn launch(handle: usize, config: &LaunchConfig, params: *const *const c_void) -> Code {
    let LaunchConfig { grid, block, shared, stream, .. } = *config;
    let shared = shared as usize;
    let attributes = match config.attribute_count {
        0 => &[][..],
        // SAFETY: by the driver's contract there are so many.
        count => unsafe { std::slice::from_raw_parts(config.attributes, count as usize) },
    };
    if attributes.iter().any(|a| a.kind != PROGRAMMATIC_STREAM_SERIALIZATION) {
        return codes::NOT_SUPPORTED;
    }
    let early = attributes.iter().any(|a| a.value != 0);
    on_device(|d, current| {
        d.check_launch(handle, block, shared)?;
        let function = d.function(handle)?;
        if early && !function.waits() {
            // A GPU would launch it, and it would read what is not there yet.
            return Err(codes::INVALID_VALUE);
        }
        let sizes = function.param_sizes();
        if params.is_null() && !sizes.is_empty() {
            return Err(codes::INVALID_VALUE);
        }
        let mut values = Vec::new();
        for (i, size) in sizes.into_iter().enumerate() {
            // SAFETY: by the driver's contract there is a pointer for every parameter, to a value of its size.
            let bytes = unsafe {
                let value = *params.add(i);
                if value.is_null() {
                    return Err(codes::INVALID_VALUE);
                }
                std::slice::from_raw_parts(value.cast::<u8>(), size)
            };
            values.push(Param::bytes(bytes));
        }
        d.issue(stream, current, Work::Launch { function, grid, block, shared, params: values })
    })
}
