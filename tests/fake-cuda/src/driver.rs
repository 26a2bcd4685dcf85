//! The state behind the entry points: devices, memory, modules, streams, graphs.
//!
//! Work is done when it is issued, on whatever stream; so what streams must be made to wait for is not checked. A kernel's
//! fault is reported by the call after the launch, and by every call from then on, as a device does.

use crate::codes::{self, Code};
use crate::image;
use crate::settings::Settings;
use attar_ptx::{Buffer, Error, KernelInfo, Launch, Memory, Module, Options, Param, Stats};
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::Write;
use std::sync::Arc;

/// Dynamic shared memory a launch may have without asking, and the most a block can have.
const DEFAULT_SHARED: usize = 48 << 10;
const MAX_SHARED: usize = 227 << 10;

/// Result of a call.
pub(crate) type Outcome<T> = Result<T, Code>;

#[derive(Debug, Default)]
struct Device {
    /// Times the primary context is retained.
    retained: u32,
    used: usize,
    launches: u64,
    /// What every call gives from now on.
    broken: Option<Code>,
}

#[derive(Debug)]
pub(crate) struct Function {
    module: Arc<Module>,
    info: KernelInfo,
}

impl Function {
    /// Sizes of the parameters.
    pub(crate) fn param_sizes(&self) -> Vec<usize> {
        self.info.params.iter().map(|p| p.bytes).collect()
    }

    /// Whether it waits for the launches before it.
    pub(crate) fn waits(&self) -> bool {
        self.info.waits
    }
}

/// Something a stream does.
#[derive(Debug, Clone)]
pub(crate) enum Work {
    Launch {
        function: Arc<Function>,
        grid: [u32; 3],
        block: [u32; 3],
        shared: usize,
        params: Vec<Param>,
    },
    /// Addresses of the host are those of the process.
    FromHost {
        to: u64,
        from: usize,
        len: usize,
    },
    ToHost {
        to: usize,
        from: u64,
        len: usize,
    },
    Copy {
        to: u64,
        from: u64,
        len: usize,
    },
    Fill {
        to: u64,
        byte: u8,
        len: usize,
    },
    /// A function of the host, with its argument.
    Call {
        function: usize,
        argument: usize,
    },
}

#[derive(Debug, Default)]
struct Stream {
    device: usize,
    capture: Option<u64>,
}

#[derive(Debug, Default)]
struct Event {
    /// The capture it was recorded in, where it was recorded in one.
    capture: Option<u64>,
    recorded: bool,
}

#[derive(Debug)]
pub(crate) struct Driver {
    pub(crate) settings: Settings,
    devices: Vec<Device>,
    memory: Memory,
    /// Live allocations by address, with their device.
    allocations: BTreeMap<u64, (Buffer, usize, usize)>,
    modules: BTreeMap<usize, Arc<Module>>,
    functions: BTreeMap<usize, Arc<Function>>,
    /// Dynamic shared memory each function may have.
    allowed_shared: BTreeMap<usize, usize>,
    streams: BTreeMap<usize, Stream>,
    events: BTreeMap<usize, Event>,
    captures: BTreeMap<u64, Vec<Work>>,
    graphs: BTreeMap<usize, Vec<Work>>,
    next_handle: usize,
    copies: u64,
}

impl Driver {
    pub(crate) fn new(settings: Settings) -> Driver {
        let devices = (0..settings.devices).map(|_| Device::default()).collect();
        Driver {
            settings,
            devices,
            memory: Memory::new(),
            allocations: BTreeMap::new(),
            modules: BTreeMap::new(),
            functions: BTreeMap::new(),
            allowed_shared: BTreeMap::new(),
            streams: BTreeMap::new(),
            events: BTreeMap::new(),
            captures: BTreeMap::new(),
            graphs: BTreeMap::new(),
            next_handle: 0x1000,
            copies: 0,
        }
    }

    fn handle(&mut self) -> usize {
        self.next_handle += 16;
        self.next_handle
    }

    pub(crate) fn device(&self, ordinal: i32) -> Outcome<usize> {
        if self.devices.is_empty() {
            return Err(codes::NO_DEVICE);
        }
        let found = usize::try_from(ordinal).ok().filter(|d| *d < self.devices.len());
        found.ok_or(codes::INVALID_DEVICE)
    }

    pub(crate) fn device_count(&self) -> usize {
        self.devices.len()
    }

    pub(crate) fn retain(&mut self, device: usize) {
        self.devices[device].retained += 1;
    }

    pub(crate) fn release(&mut self, device: usize) -> Outcome<()> {
        let retained = &mut self.devices[device].retained;
        *retained = retained.checked_sub(1).ok_or(codes::INVALID_CONTEXT)?;
        Ok(())
    }

    /// What a call on a device gives before it does anything.
    pub(crate) fn working(&self, device: usize) -> Outcome<()> {
        match self.devices[device].broken {
            Some(code) => Err(code),
            None => Ok(()),
        }
    }

    /// Free bytes and all bytes.
    pub(crate) fn memory_info(&self, device: usize) -> (usize, usize) {
        let total = self.settings.memory;
        (total.saturating_sub(self.devices[device].used), total)
    }

    pub(crate) fn alloc(&mut self, device: usize, len: usize) -> Outcome<u64> {
        self.working(device)?;
        if len == 0 {
            return Err(codes::INVALID_VALUE);
        }
        // Devices hand out memory in pages of their own.
        let granted = len.next_multiple_of(512);
        if granted > self.memory_info(device).0 {
            return Err(codes::OUT_OF_MEMORY);
        }
        self.devices[device].used += granted;
        let name = format!("allocation {} of {len} bytes", self.allocations.len());
        let buffer = self.memory.alloc_uninit(&name, len);
        self.allocations.insert(buffer.address(), (buffer, granted, device));
        Ok(buffer.address())
    }

    pub(crate) fn free(&mut self, address: u64) -> Outcome<()> {
        let (buffer, granted, device) = self.allocations.remove(&address).ok_or(codes::INVALID_VALUE)?;
        self.devices[device].used -= granted;
        self.memory.free(buffer);
        self.working(device)
    }

    pub(crate) fn load(&mut self, device: usize, text: &[u8]) -> Outcome<usize> {
        self.working(device)?;
        match image::load(text, &self.settings) {
            Ok(module) => {
                let handle = self.handle();
                self.modules.insert(handle, Arc::new(module));
                Ok(handle)
            }
            Err((code, why)) => {
                report(&format!("the module is refused: {why}"));
                Err(code)
            }
        }
    }

    pub(crate) fn unload(&mut self, module: usize) -> Outcome<()> {
        self.modules.remove(&module).map(|_| ()).ok_or(codes::INVALID_HANDLE)
    }

    pub(crate) fn function_of(&mut self, module: usize, name: &str) -> Outcome<usize> {
        let module = self.modules.get(&module).ok_or(codes::INVALID_HANDLE)?.clone();
        let info = module.kernel(name).ok_or(codes::NOT_FOUND)?;
        let handle = self.handle();
        self.functions.insert(handle, Arc::new(Function { module, info }));
        Ok(handle)
    }

    pub(crate) fn function(&self, handle: usize) -> Outcome<Arc<Function>> {
        self.functions.get(&handle).cloned().ok_or(codes::INVALID_HANDLE)
    }

    /// Address and bytes of a variable of a module.
    pub(crate) fn variable(&mut self, module: usize, name: &str) -> Outcome<(u64, usize)> {
        let module = self.modules.get(&module).ok_or(codes::INVALID_HANDLE)?.clone();
        let buffer = module.variable(&mut self.memory, name).map_err(|_| codes::NOT_FOUND)?;
        Ok((buffer.address(), self.memory.bytes(buffer).len()))
    }

    /// Attributes by their number in `CUfunction_attribute`.
    pub(crate) fn function_attribute(&self, handle: usize, attribute: i32) -> Outcome<i32> {
        let function = self.function(handle)?;
        let (major, minor) = self.settings.capability;
        Ok(match attribute {
            0 => function.info.max_threads.unwrap_or(1024) as i32,
            1 => function.info.shared_bytes as i32,
            3 => function.info.local_bytes as i32,
            5 | 6 => major * 10 + minor,
            8 => self.allowed_shared.get(&handle).map_or(DEFAULT_SHARED, |b| *b) as i32,
            // Constants, registers, cache mode: nothing an interpreter has.
            2 | 4 | 7 | 9 => 0,
            _ => return Err(codes::INVALID_VALUE),
        })
    }

    pub(crate) fn set_function_attribute(
        &mut self,
        handle: usize,
        attribute: i32,
        value: i32,
    ) -> Outcome<()> {
        let function = self.function(handle)?;
        let bytes = usize::try_from(value).map_err(|_| codes::INVALID_VALUE)?;
        match attribute {
            8 if function.info.shared_bytes + bytes <= MAX_SHARED => {
                self.allowed_shared.insert(handle, bytes);
                Ok(())
            }
            9 => Ok(()),
            _ => Err(codes::INVALID_VALUE),
        }
    }

    pub(crate) fn new_stream(&mut self, device: usize) -> Outcome<usize> {
        self.working(device)?;
        let handle = self.handle();
        self.streams.insert(handle, Stream { device, capture: None });
        Ok(handle)
    }

    pub(crate) fn drop_stream(&mut self, stream: usize) -> Outcome<()> {
        self.streams.remove(&stream).map(|_| ()).ok_or(codes::INVALID_HANDLE)
    }

    /// The device of a stream. Stream 0, and the two other defaults, are those of the current context.
    fn stream_device(&self, stream: usize, current: usize) -> Outcome<usize> {
        if stream <= 2 {
            return Ok(current);
        }
        self.streams.get(&stream).map(|s| s.device).ok_or(codes::INVALID_HANDLE)
    }

    pub(crate) fn synchronise(&self, stream: usize, current: usize) -> Outcome<()> {
        let device = self.stream_device(stream, current)?;
        if self.streams.get(&stream).is_some_and(|s| s.capture.is_some()) {
            return Err(codes::STREAM_CAPTURE_UNSUPPORTED);
        }
        self.working(device)
    }

    pub(crate) fn new_event(&mut self) -> usize {
        let handle = self.handle();
        self.events.insert(handle, Event::default());
        handle
    }

    pub(crate) fn drop_event(&mut self, event: usize) -> Outcome<()> {
        self.events.remove(&event).map(|_| ()).ok_or(codes::INVALID_HANDLE)
    }

    pub(crate) fn record(&mut self, event: usize, stream: usize, current: usize) -> Outcome<()> {
        let device = self.stream_device(stream, current)?;
        let capture = self.streams.get(&stream).and_then(|s| s.capture);
        let event = self.events.get_mut(&event).ok_or(codes::INVALID_HANDLE)?;
        *event = Event { capture, recorded: true };
        self.working(device)
    }

    /// A stream that waits for captured work joins the capture; one that captures must not wait for other work.
    pub(crate) fn wait(&mut self, stream: usize, event: usize, current: usize) -> Outcome<()> {
        let device = self.stream_device(stream, current)?;
        self.working(device)?;
        let event = self.events.get(&event).ok_or(codes::INVALID_HANDLE)?;
        let capture = event.capture.filter(|c| self.captures.contains_key(c));
        let Some(waiting) = self.streams.get_mut(&stream) else { return Ok(()) };
        match (waiting.capture, capture) {
            (None, Some(capture)) => waiting.capture = Some(capture),
            (Some(own), other) if event.recorded && other != Some(own) => {
                return Err(codes::STREAM_CAPTURE_ISOLATION);
            }
            _ => {}
        }
        Ok(())
    }

    pub(crate) fn event_done(&self, event: usize, current: usize) -> Outcome<()> {
        self.events.get(&event).ok_or(codes::INVALID_HANDLE)?;
        self.working(current)
    }

    pub(crate) fn begin_capture(&mut self, stream: usize) -> Outcome<()> {
        let id = self.handle() as u64;
        let Some(stream) = self.streams.get_mut(&stream) else {
            return Err(codes::STREAM_CAPTURE_UNSUPPORTED);
        };
        if stream.capture.is_some() {
            return Err(codes::STREAM_CAPTURE_UNSUPPORTED);
        }
        stream.capture = Some(id);
        self.captures.insert(id, Vec::new());
        Ok(())
    }

    pub(crate) fn is_capturing(&self, stream: usize) -> bool {
        self.streams.get(&stream).is_some_and(|s| s.capture.is_some())
    }

    /// The graph of what was captured.
    pub(crate) fn end_capture(&mut self, stream: usize) -> Outcome<usize> {
        let capture = self.streams.get(&stream).and_then(|s| s.capture).ok_or(codes::INVALID_VALUE)?;
        for stream in self.streams.values_mut().filter(|s| s.capture == Some(capture)) {
            stream.capture = None;
        }
        let work = self.captures.remove(&capture).ok_or(codes::INVALID_VALUE)?;
        let handle = self.handle();
        self.graphs.insert(handle, work);
        Ok(handle)
    }

    /// A graph ready to launch: its own copy of the work.
    pub(crate) fn instantiate(&mut self, graph: usize) -> Outcome<usize> {
        let work = self.graphs.get(&graph).ok_or(codes::INVALID_HANDLE)?.clone();
        let handle = self.handle();
        self.graphs.insert(handle, work);
        Ok(handle)
    }

    pub(crate) fn drop_graph(&mut self, graph: usize) -> Outcome<()> {
        self.graphs.remove(&graph).map(|_| ()).ok_or(codes::INVALID_HANDLE)
    }

    pub(crate) fn has_graph(&self, graph: usize) -> bool {
        self.graphs.contains_key(&graph)
    }

    pub(crate) fn launch_graph(&mut self, graph: usize, stream: usize, current: usize) -> Outcome<()> {
        let device = self.stream_device(stream, current)?;
        self.working(device)?;
        let work = self.graphs.get(&graph).ok_or(codes::INVALID_HANDLE)?.clone();
        if let Some(path) = &self.settings.log {
            log(path, &format!("graph\t{}", work.len()));
        }
        for item in &work {
            self.perform(device, item)?;
        }
        Ok(())
    }

    /// What a launch must not ask for.
    pub(crate) fn check_launch(&self, handle: usize, block: [u32; 3], shared: usize) -> Outcome<()> {
        let function = self.function(handle)?;
        let threads: u64 = block.iter().map(|n| u64::from(*n)).product();
        if threads == 0 || threads > 1024 {
            return Err(codes::INVALID_VALUE);
        }
        if threads > u64::from(function.info.max_threads.unwrap_or(1024)) {
            return Err(codes::LAUNCH_OUT_OF_RESOURCES);
        }
        let asked = self.allowed_shared.get(&handle).copied().unwrap_or(0);
        if shared > asked && function.info.shared_bytes + shared > DEFAULT_SHARED {
            return Err(codes::INVALID_VALUE);
        }
        Ok(())
    }

    /// Does work, or keeps it where the stream captures.
    pub(crate) fn issue(&mut self, stream: usize, current: usize, work: Work) -> Outcome<()> {
        let device = self.stream_device(stream, current)?;
        if let Some(capture) = self.streams.get(&stream).and_then(|s| s.capture) {
            self.captures.get_mut(&capture).ok_or(codes::INVALID_HANDLE)?.push(work);
            return Ok(());
        }
        self.perform(device, &work)
    }

    fn perform(&mut self, device: usize, work: &Work) -> Outcome<()> {
        self.working(device)?;
        match work {
            Work::FromHost { len: 0, .. } | Work::ToHost { len: 0, .. } => Ok(()),
            Work::Launch { function, grid, block, shared, params } => {
                let launch = Launch {
                    kernel: &function.info.name,
                    grid: *grid,
                    block: *block,
                    dynamic_shared: *shared,
                    params,
                };
                let options = Options::checked(self.settings.mode);
                let result = function.module.launch(&mut self.memory, &launch, &options);
                self.after_launch(device, &launch, result);
                Ok(())
            }
            Work::FromHost { to, from, len } => {
                self.copies += 1;
                if self.settings.fail_copy == Some(self.copies) {
                    report(&format!("copy {} fails, as it was asked to", self.copies));
                    return Err(codes::UNKNOWN);
                }
                // SAFETY: the caller of the driver says that `len` bytes are there, now or when its graph runs.
                let bytes = unsafe { std::slice::from_raw_parts(*from as *const u8, *len) };
                self.memory.write(*to, bytes).map_err(|_| codes::INVALID_VALUE)
            }
            Work::ToHost { to, from, len } => {
                let bytes = self.memory.read(*from, *len).map_err(|_| codes::INVALID_VALUE)?;
                // SAFETY: as above; and the memory is the host's, which no buffer of `memory` overlaps.
                unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), *to as *mut u8, *len) };
                Ok(())
            }
            Work::Copy { to, from, len } => {
                let bytes = self.memory.read(*from, *len).map_err(|_| codes::INVALID_VALUE)?.to_vec();
                self.memory.write(*to, &bytes).map_err(|_| codes::INVALID_VALUE)
            }
            Work::Fill { to, byte, len } => {
                self.memory.read(*to, *len).map_err(|_| codes::INVALID_VALUE)?;
                self.memory.write(*to, &vec![*byte; *len]).map_err(|_| codes::INVALID_VALUE)
            }
            Work::Call { function, argument } => {
                // SAFETY: the caller of the driver gave a function of this type, with its argument.
                unsafe {
                    let function = std::mem::transmute::<usize, extern "C" fn(usize)>(*function);
                    function(*argument);
                }
                Ok(())
            }
        }
    }

    fn after_launch(&mut self, device: usize, launch: &Launch<'_>, result: Result<Stats, Error>) {
        let state = &mut self.devices[device];
        state.launches += 1;
        match result {
            Ok(stats) => {
                if let Some(path) = &self.settings.log {
                    log_launch(path, launch, &stats);
                }
            }
            Err(error) => {
                report(&error.to_string());
                state.broken = Some(codes::of_fault(&error.kind));
            }
        }
        if self.settings.lose_after == Some(state.launches) {
            report(&format!("the device is lost after {} launches, as it was asked to be", state.launches));
            state.broken = Some(codes::DEVICE_UNAVAILABLE);
        }
    }
}

#[expect(clippy::print_stderr, reason = "a driver has no other way to say more than a code")]
fn report(what: &str) {
    eprintln!("fake CUDA driver (PTX interpreter): {what}");
}

fn log_launch(path: &str, launch: &Launch<'_>, stats: &Stats) {
    let line = format!(
        "{}\t{:?}\t{:?}\t{}\t{}\t{}",
        launch.kernel,
        launch.grid,
        launch.block,
        stats.warp_instructions(),
        stats.global_read.bytes,
        stats.global_written.bytes
    );
    log(path, &line);
}

fn log(path: &str, line: &str) {
    let written =
        OpenOptions::new().create(true).append(true).open(path).and_then(|mut f| writeln!(f, "{line}"));
    if let Err(error) = written {
        report(&format!("{path}: {error}"));
    }
}
