//! Attaching the program to an interface: TCX where the kernel has it, clsact otherwise.
//!
//! Everything that depends on aya's attachment API is here.

use std::future::ready;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::pin::pin;

use aya::programs::links::LinkOrder;
use aya::programs::tc::{self, NlOptions, SchedClassifierLinkId, TcAttachOptions, TcHandle};
use aya::programs::{ProgramError, SchedClassifier, TcAttachType, TcError};
use futures_util::TryStreamExt as _;
use netlink_packet_route::tc::TcMessage;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, UnixCredentials, connect, getsockopt, socket,
    sockopt,
};
use nix::unistd::geteuid;
use thiserror::Error;

use crate::program::PROGRAM_NAME;

/// Where our clsact filter stands. The lowest priority number runs first; among filters of one
/// priority, `cls_bpf` runs the newest first.
const CLSACT_PRIORITY: u16 = 1;
/// Handle of our clsact filter, ours alone: "vx" in ASCII.
const CLSACT_HANDLE: TcHandle = TcHandle::new(0, 0x7678);

/// How a program hangs on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// A TCX link, gone with the process (Linux 6.6).
    Tcx,
    /// A filter of the clsact qdisc.
    Clsact,
}

impl Method {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Tcx, Self::Clsact];

    /// The word in JSON and messages.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        }
    }
}

/// Why a program could not be attached.
#[derive(Debug, Error)]
pub enum AttachError {
    /// By the method that was asked for, or by the last one tried.
    #[error("cannot attach to {interface} by {method}: {reason}", method = method.as_str())]
    Refused {
        /// The interface.
        interface: String,
        /// The method.
        method: Method,
        /// Why not.
        reason: String,
    },
    /// Another vxcsum is there.
    #[error(
        "{interface} is already watched by vxcsum, process {process}: stop that one first, or \
         leave {interface} out"
    )]
    Taken {
        /// The interface.
        interface: String,
        /// The other process.
        process: String,
    },
}

/// A program that hangs on an interface.
#[derive(Debug)]
pub struct Attachment {
    /// How.
    pub method: Method,
    link: SchedClassifierLinkId,
    program_id: u32,
}

impl Attachment {
    /// Attaches `program` to the egress of `interface`, first in line. Without `method`, finds out
    /// by trying which one the kernel has.
    pub fn new(
        program: &mut SchedClassifier,
        interface: &str,
        method: Option<Method>,
    ) -> Result<Self, AttachError> {
        let refused = |method, reason: String| AttachError::Refused {
            interface: interface.to_owned(),
            method,
            reason,
        };
        remove_stale_filter(interface).map_err(|error| refused(Method::Clsact, chain(&error)))?;
        let info = program.info().map_err(|error| refused(Method::Clsact, chain(&error)))?;
        let program_id = info.id();
        if method != Some(Method::Clsact) {
            let order = TcAttachOptions::TcxOrder(LinkOrder::first());
            match program.attach_with_options(interface, TcAttachType::Egress, order) {
                Ok(link) => return Ok(Self { method: Method::Tcx, link, program_id }),
                // Kernels before 6.6 know no such attach type.
                Err(error) if method.is_none() && is_unknown_to_kernel(&error) => {}
                Err(error) => return Err(refused(Method::Tcx, chain(&error))),
            }
        }
        let refused = |error: &dyn std::error::Error| refused(Method::Clsact, chain(error));
        match tc::qdisc_add_clsact(interface) {
            Err(error) if !is_there_already(&error) => return Err(refused(&error)),
            _ => {}
        }
        let options = TcAttachOptions::Netlink(NlOptions {
            priority: CLSACT_PRIORITY,
            handle: CLSACT_HANDLE,
            classid: None,
        });
        program
            .attach_with_options(interface, TcAttachType::Egress, options)
            .map(|link| Self { method: Method::Clsact, link, program_id })
            .map_err(|error| refused(&error))
    }

    /// Takes the program off: the TCX link, or our filter; never the qdisc.
    pub fn detach(self, program: &mut SchedClassifier) -> Result<(), ProgramError> {
        program.detach(self.link)
    }
}

impl Attachment {
    /// Whether the program still hangs on the interface of this index. It does not where another
    /// interface has that index by now, where it was in another network namespace meanwhile, or where
    /// somebody has deleted the qdisc.
    pub async fn is_in_place(&self, index: u32) -> bool {
        // Where that cannot be told, it is taken to be.
        match self.method {
            Method::Tcx => {
                tcx_programs(index).map_or(true, |programs| programs.contains(&self.program_id))
            }
            Method::Clsact => has_our_filter(index).await.unwrap_or(true),
        }
    }
}

/// The ids of the programs on the egress of an interface. aya opens each of them, which takes
/// `CAP_SYS_ADMIN`.
fn tcx_programs(index: u32) -> io::Result<Vec<u32>> {
    const BPF_PROG_QUERY: libc::c_long = 16;
    const BPF_TCX_EGRESS: u32 = 47;
    /// `BPF_MPROG_MAX`
    const MAX_PROGRAMS: usize = 64;
    /// The start of `union bpf_attr` for that command.
    #[repr(C)]
    struct Query {
        target_ifindex: u32,
        attach_type: u32,
        flags: [u32; 2],
        prog_ids: u64,
        count: u32,
        padding: u32,
    }
    let mut programs = vec![0_u32; MAX_PROGRAMS];
    let mut query = Query {
        target_ifindex: index,
        attach_type: BPF_TCX_EGRESS,
        flags: [0; 2],
        prog_ids: programs.as_mut_ptr() as u64,
        count: MAX_PROGRAMS as u32,
        padding: 0,
    };
    // SAFETY: `query` is a live, fully initialised prefix of `union bpf_attr`, and its size is passed
    // with it; what it points to is live and has room for as many ids as it says.
    let done =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_QUERY, &raw mut query, size_of::<Query>()) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    programs.truncate(query.count as usize);
    Ok(programs)
}

/// Whether the filter of our handle and priority is on the egress of an interface.
async fn has_our_filter(index: u32) -> Result<bool, rtnetlink::Error> {
    let (connection, handle, _) =
        rtnetlink::new_connection().map_err(|_| rtnetlink::Error::RequestFailed)?;
    let connection = tokio::spawn(connection);
    let is_ours = |filter: &TcMessage| {
        let at = (u32::from(filter.header.handle), filter.header.info >> 16);
        at == (CLSACT_HANDLE.into(), CLSACT_PRIORITY.into())
    };
    let filters = handle.traffic_filter(index.cast_signed()).get().egress().execute();
    let outcome = pin!(filters).try_filter(|it| ready(is_ours(it))).try_next().await;
    connection.abort();
    Ok(outcome?.is_some())
}

/// Removes the clsact filter that an earlier vxcsum left when it was killed. The caller holds the
/// [`Claim`] of the interface, so a filter with our program's name has no owner.
fn remove_stale_filter(interface: &str) -> Result<(), TcError> {
    match tc::qdisc_detach_program(interface, TcAttachType::Egress, PROGRAM_NAME) {
        Err(TcError::IoError(error)) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // Without clsact there are no filters to list.
        Err(TcError::NetlinkError(_)) => Ok(()),
        other => other,
    }
}

pub(crate) fn is_unknown_to_kernel(error: &ProgramError) -> bool {
    // E2BIG: the request is longer than those that the kernel knows, and not zero there.
    matches!(raw_os_error(error), Some(libc::EINVAL | libc::EOPNOTSUPP | libc::E2BIG))
}

fn is_there_already(error: &TcError) -> bool {
    matches!(error, TcError::AlreadyAttached) || raw_os_error(error) == Some(libc::EEXIST)
}

fn raw_os_error(error: &(dyn std::error::Error + 'static)) -> Option<i32> {
    let own = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error);
    own.or_else(|| raw_os_error(error.source()?))
}

/// An error with its causes, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        // Some errors repeat their source in their own text.
        let error_text = error.to_string();
        if !text.contains(&error_text) {
            text = format!("{text}: {error_text}");
        }
        cause = error.source();
    }
    text
}

/// The sole right to watch an interface, held by the process as long as it lives.
///
/// An abstract Unix socket: it belongs to the network namespace, as the interface does, and the
/// kernel takes it back however the process ends.
#[derive(Debug)]
pub struct Claim {
    socket: Option<UnixListener>,
}

impl Claim {
    /// Claims an interface.
    pub fn new(interface: &str, index: u32) -> Result<Self, AttachError> {
        let refused = |reason: io::Error| AttachError::Refused {
            interface: interface.to_owned(),
            method: Method::Tcx,
            reason: format!("cannot claim the interface: {reason}"),
        };
        let name = format!("vxcsum/egress/{index}");
        let address = SocketAddr::from_abstract_name(&name).map_err(refused)?;
        match UnixListener::bind_addr(&address) {
            Ok(socket) => {
                socket.set_nonblocking(true).map_err(refused)?;
                Ok(Self { socket: Some(socket) })
            }
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                // The name is open to everybody, and nobody without privileges may keep us out.
                let is_impostor = |uid| uid != 0 && uid != geteuid().as_raw();
                match owner(&name) {
                    Ok(owner) if !is_impostor(owner.uid()) => Err(AttachError::Taken {
                        interface: interface.to_owned(),
                        process: owner.pid().to_string(),
                    }),
                    Ok(owner) => {
                        tracing::warn!(
                            "process {} of user {} pretends to watch {interface}: going on",
                            owner.pid(),
                            owner.uid()
                        );
                        Ok(Self { socket: None })
                    }
                    // Its queue is full, which ours never is for long.
                    Err(Errno::EAGAIN) => {
                        tracing::warn!("somebody pretends to watch {interface}: going on");
                        Ok(Self { socket: None })
                    }
                    Err(error) => Err(refused(error.into())),
                }
            }
            Err(error) => Err(refused(error)),
        }
    }

    /// Lets go of those who have asked who claims the interface: they know by the connection itself,
    /// but stay in its queue, and there would be no room for the next ones.
    pub fn answer(&self) {
        if let Some(socket) = &self.socket {
            while socket.accept().is_ok() {}
        }
    }
}

/// Who listens on an abstract socket. Does not wait for room in its queue (EAGAIN).
fn owner(name: &str) -> nix::Result<UnixCredentials> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(socket.as_raw_fd(), &UnixAddr::new_abstract(name.as_bytes())?)?;
    getsockopt(&socket, sockopt::PeerCredentials)
}
